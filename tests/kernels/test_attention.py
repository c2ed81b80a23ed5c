import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context
from ultrathink_jax.kernels import attention_blockwise as blockwise
from ultrathink_jax.kernels.attention import attention


def inputs(length, num_heads=4, num_kv_heads=2, dtype=jnp.float32, batch=2):
  keys = jax.random.split(jax.random.key(0), 3)
  shape = lambda heads: (batch, length, heads, 8)
  heads = (num_heads, num_kv_heads, num_kv_heads)
  return [jax.random.normal(key, shape(n), dtype) for key, n in zip(keys, heads, strict=True)]


def where(context):
  return context.positions, context.positions, context.segment_ids, context.segment_ids


def oracle(query, key, value, context, window):
  """Attention of every query by itself, in float64."""
  query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
  positions, segments = np.asarray(context.positions), np.asarray(context.segment_ids)
  out = np.zeros_like(query)
  for b, t, n in np.ndindex(query.shape[:3]):
    k = n // (query.shape[2] // key.shape[2])
    near = positions[b, t] - positions[b] < (window or np.inf)
    seen = (segments[b] == segments[b, t]) & (segments[b] > 0) & (positions[b] <= positions[b, t]) & near
    if seen.any():
      scores = np.exp(key[b, seen, k] @ query[b, t, n] / np.sqrt(query.shape[-1]))
      out[b, t, n] = scores / scores.sum() @ value[b, seen, k]
  return out


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_equals_a_loop_over_queries(window, num_kv_heads):
  context = packed_context(5, 1, 9, -3, batch=2)
  arrays = inputs(18, num_kv_heads=num_kv_heads)
  out = attention(*arrays, *where(context), window)
  np.testing.assert_allclose(out, oracle(*arrays, context, window), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3, 200])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blockwise_equals_the_plain_form_forward_and_gradient(window, dtype):
  context = packed_context(130, 7, 160, -4, batch=2)
  arrays = inputs(301, dtype=dtype)
  tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.05}

  def outputs(function):
    loss = lambda *a: jnp.sum(jnp.sin(function(*a, *where(context), window).astype(jnp.float32)))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

  both = map(jax.tree.leaves, map(outputs, (blockwise.attention_blockwise, attention)))
  for ours, plain in zip(*both, strict=True):
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), **tolerance)
