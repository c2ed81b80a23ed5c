import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context
from ultrathink_jax.kernels.ssd import ssd
from ultrathink_jax.kernels.ssd_chunked import ssd_chunked


def inputs(length, dtype=jnp.float32, batch=2, heads=4, groups=2, head_dim=3, state=5):
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (batch, length, heads, head_dim), dtype)
  dt = jax.nn.softplus(jax.random.normal(keys[1], (batch, length, heads)))
  a = -jnp.exp(jax.random.normal(keys[2], (heads,)))
  b, c = (jax.random.normal(key, (batch, length, groups, state), dtype) for key in keys[3:5])
  h = jax.random.normal(keys[5], (batch, heads, head_dim, state))
  return x, dt, a, b, c, h


def test_the_recurrence_is_the_published_one():
  x, dt, a, b, c, h = (np.asarray(array, np.float64) for array in inputs(7))
  ones = jnp.ones((2, 7), jnp.int32)
  y, last = ssd(*map(jnp.asarray, (x, dt, a, b, c)), ones, jnp.asarray(h))
  for t in range(7):
    for head in range(4):
      decay = np.exp(dt[:, t, head] * a[head])[:, None, None]
      added = dt[:, t, head, None, None] * x[:, t, head, :, None] * b[:, t, head // 2, None, :]
      h[:, head] = decay * h[:, head] + added
      np.testing.assert_allclose(
        y[:, t, head], np.einsum("bpz,bz->bp", h[:, head], c[:, t, head // 2]), rtol=1e-4, atol=1e-5
      )
  np.testing.assert_allclose(last, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (5, 1), (16, 16), (37, 4), (37, 16), (37, 64)])
def test_chunks_equal_the_recurrence_in_float64(length, chunk):
  with jax.enable_x64(True):
    x, dt, a, b, c, h = (jnp.asarray(array, jnp.float64) for array in inputs(length))
    documents = [3, length - 3] if length > 3 else [length]
    segments = packed_context(*documents, batch=2).segment_ids

    def outputs(function, *extra):
      loss = lambda *arrays: sum(map(jnp.sum, map(jnp.sin, function(*arrays[:5], segments, arrays[5], *extra))))
      both = lambda *arrays: (
        function(*arrays[:5], segments, arrays[5], *extra),
        jax.grad(loss, argnums=range(6))(*arrays),
      )
      return jax.jit(both)(x, dt, a, b, c, h)

    chunked, recurrence = outputs(ssd_chunked, chunk), outputs(ssd)
    for ours, plain in zip(jax.tree.leaves(chunked), jax.tree.leaves(recurrence), strict=True):
      assert ours.dtype == jnp.float64
      np.testing.assert_allclose(ours, plain, rtol=1e-9, atol=1e-9)


def test_bfloat16_stays_near_float32():
  arrays = inputs(64)
  segments = packed_context(40, 24, batch=2).segment_ids
  exact, _ = ssd(*arrays[:5], segments)
  x, dt, a, b, c, _ = arrays
  half, _ = ssd_chunked(
    *(v.astype(jnp.bfloat16) if v is x or v is b or v is c else v for v in (x, dt, a, b, c)), segments
  )
  scale = float(jnp.abs(exact).max())
  assert float(jnp.abs(half.astype(jnp.float32) - exact).max()) < 0.02 * scale


def test_padding_with_zero_dt_keeps_the_state():
  x, dt, a, b, c, h = inputs(12)
  segments = packed_context(7, -5, batch=2).segment_ids
  dt = jnp.where(segments[..., None] > 0, dt, 0)
  _, padded = ssd_chunked(x, dt, a, b, c, segments, h, 4)
  _, short = ssd_chunked(x[:, :7], dt[:, :7], a, b[:, :7], c[:, :7], segments[:, :7], h, 4)
  np.testing.assert_allclose(padded, short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents", [(20, 20), (30, 10), (13, 1, 1, 25)])
def test_extreme_steps_stay_finite(documents):
  x, dt, a, b, c, _ = inputs(40)
  segments = packed_context(*documents, batch=2).segment_ids
  gradient = jax.jit(jax.grad(lambda dt: jnp.sum(ssd_chunked(x, dt, a, b, c, segments, None, 16)[0])))
  for scale in (1e-6, 1e3):
    assert bool(jnp.isfinite(gradient(dt * scale)).all())


def test_memory_of_the_gradient_is_linear_in_length():
  def temporary_bytes(length):
    shapes = ((1, length, 4, 16), (1, length, 4), (4,), (1, length, 2, 8), (1, length, 2, 8))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    loss = lambda *arrays: jnp.sum(ssd_chunked(*arrays, None, 16)[0])
    gradient = jax.jit(jax.grad(loss, argnums=range(5))).lower(*arrays, segments).compile()
    return gradient.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(65536) < 16.5 * temporary_bytes(4096)
