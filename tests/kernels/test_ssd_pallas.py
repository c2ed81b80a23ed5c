import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from tests.conftest import packed_context
from tests.kernels.test_attention_pallas import lowers_for_gpu, pytestmark, run_as_on_tpu  # noqa: F401
from tests.kernels.test_ssd import inputs
from ultrathink_jax.kernels import ssd_pallas as ssd_pallas_module
from ultrathink_jax.kernels import ssd_pallas_layout
from ultrathink_jax.kernels.names import KERNEL_OUTPUT
from ultrathink_jax.kernels.ssd import ssd
from ultrathink_jax.kernels.ssd_pallas import ssd_pallas


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch):
  """Makes rows of these lengths several parts."""
  monkeypatch.setattr(ssd_pallas_layout, "_PART_TOKENS", 256)


def outputs(function, arrays, segments, *extra):
  """Returns y, the last state and all gradients of a weighted sum of both, so that no rounding is magnified."""

  def loss(*arrays):
    y, last = function(*arrays[:5], segments, arrays[5], *extra)
    weigh = lambda array: jnp.sum(array * jnp.cos(jnp.arange(array.size)).reshape(array.shape))
    return weigh(y.astype(jnp.float32)) + weigh(last), (y, last)

  return jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))(*arrays)


def packed(length, *documents, dtype=jnp.float32):
  x, dt, a, b, c, h = inputs(length, dtype)
  segments = packed_context(*documents, batch=2).segment_ids
  return (x, jnp.where(segments[..., None] != 0, dt, 0), a, b, c, h), segments


@pytest.mark.parametrize(
  ("length", "documents", "chunk"),
  [
    (1, (1,), 128),
    (53, (20, 1, 27, -5), 16),  # boundaries inside chunks, one at a chunk's end, padding
    (53, (33, 20), 40),
    (128, (64, 63, 1), 64),  # at chunks' ends
    (600, (256, 150, 141, -53), 64),  # at a part's end, inside parts, and over several chunks
  ],
)
def test_the_kernels_equal_the_recurrence_forward_and_gradient(length, documents, chunk):
  arrays, segments = packed(length, *documents)
  both = outputs(ssd_pallas, arrays, segments, chunk), outputs(ssd, arrays, segments)
  for ours, plain in zip(*map(jax.tree.leaves, both), strict=True):
    assert ours.dtype == plain.dtype
    # float32 sums of up to 256 terms in another order, relative to the largest.
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize(("length", "documents", "chunk"), [(53, (20, 1, 27, -5), 16), (300, (140, 128, 32), 128)])
def test_the_form_for_tpu_equals_the_recurrence(monkeypatch, length, documents, chunk):
  run_as_on_tpu(monkeypatch, ssd_pallas_module)
  arrays, segments = packed(length, *documents)
  with tpu.force_tpu_interpret_mode():
    as_on_tpu = outputs(ssd_pallas, arrays, segments, chunk)
  for ours, plain in zip(*map(jax.tree.leaves, (as_on_tpu, outputs(ssd, arrays, segments))), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max()))


def test_bfloat16_stays_near_float32():
  arrays, segments = packed(40, 25, 15)
  half = [array.astype(jnp.bfloat16) if i in (0, 3, 4) else array for i, array in enumerate(arrays)]
  both = outputs(ssd_pallas, half, segments, 16), outputs(ssd, [array.astype(jnp.float32) for array in half], segments)
  for ours, exact in zip(*map(jax.tree.leaves, both), strict=True):
    scale = float(jnp.abs(exact).max())
    # Factors of the products, and the states the backward pass reads, have 8 bits: 0.4 % each, a few in a row.
    assert float(jnp.abs(ours.astype(jnp.float32) - exact).max()) < 0.02 * scale


def test_without_a_state_it_starts_from_zero():
  (x, dt, a, b, c, h), segments = packed(20, 20)
  for ours, zero in zip(
    ssd_pallas(x, dt, a, b, c, segments), ssd_pallas(x, dt, a, b, c, segments, jnp.zeros_like(h)), strict=True
  ):
    np.testing.assert_array_equal(ours, zero)


def test_large_steps_stay_finite():
  arrays, segments = packed(40, 13, 1, 26)
  arrays = (arrays[0], 1e3 * arrays[1], *arrays[2:])
  for leaf in jax.tree.leaves(outputs(ssd_pallas, arrays, segments, 16)):
    assert bool(jnp.isfinite(leaf).all())


def test_the_backward_pass_runs_no_forward_kernel_where_their_results_are_kept():
  (x, dt, a, b, c, _), segments = packed(20, 20)
  loss = lambda x: jnp.sum(ssd_pallas(x, dt, a, b, c, segments)[0])

  def num_forward_kernels(loss):
    return str(jax.make_jaxpr(jax.grad(loss))(x)).count("name=_forward_kernel")

  keep = jax.checkpoint_policies.save_only_these_names(KERNEL_OUTPUT)
  once = num_forward_kernels(loss)
  assert num_forward_kernels(jax.checkpoint(loss, policy=keep)) == once
  assert num_forward_kernels(jax.checkpoint(loss)) == 2 * once


@lowers_for_gpu
@pytest.mark.parametrize(("length", "state"), [(300, 64), (8192, 64), (8192, 128)])
def test_the_kernels_lower_for_gpu(length, state):
  shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
  half = jnp.bfloat16

  def gradient(x, dt, a, b, c, segments):
    loss = lambda *arrays: jnp.sum(jnp.square(ssd_pallas(*arrays, segments)[0]))
    return jax.grad(loss, argnums=range(5))(x, dt, a, b, c)

  arrays = (
    shape(2, length, 16, 64, dtype=half),
    shape(2, length, 16),
    shape(16),
    shape(2, length, 2, state, dtype=half),
    shape(2, length, 2, state, dtype=half),
    shape(2, length, dtype=jnp.int32),
  )
  program = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("cuda",))
  # Forward and backward: what parts add, the states between them, and outputs or gradients.
  assert program.as_text().count("__gpu$xla.gpu.triton") == 6


@pytest.mark.gpu
@pytest.mark.tpu
@pytest.mark.parametrize(
  ("documents", "heads", "state"), [((600, 1, 380, -19), 8, 64), ((1024, 700, 1, 323), 64, 64), ((512, 512), 8, 128)]
)
def test_the_compiled_kernels_equal_the_recurrence(documents, heads, state):
  segments = packed_context(*documents, batch=2).segment_ids
  x, dt, a, b, c, h = inputs(segments.shape[1], jnp.bfloat16, heads=heads, groups=heads // 4, head_dim=64, state=state)
  arrays = (x, jnp.where(segments[..., None] != 0, dt, 0), a, b, c, h)
  exact = outputs(ssd, [array.astype(jnp.float32) for array in arrays], segments)
  for ours, plain in zip(*map(jax.tree.leaves, (outputs(ssd_pallas, arrays, segments), exact)), strict=True):
    scale = float(jnp.abs(plain).max())
    assert float(jnp.abs(ours.astype(jnp.float32) - plain).max()) < 0.03 * scale
