import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context
from ultrathink_jax.kernels import attention_blockwise as blockwise
from ultrathink_jax.kernels.attention import Scoring, attention


def inputs(length, num_heads=4, num_kv_heads=2, dtype=jnp.float32, batch=2):
  keys = jax.random.split(jax.random.key(0), 3)
  shape = lambda heads: (batch, length, heads, 8)
  heads = (num_heads, num_kv_heads, num_kv_heads)
  return [jax.random.normal(key, shape(n), dtype) for key, n in zip(keys, heads, strict=True)]


def where(context):
  return context.positions, context.positions, context.segment_ids, context.segment_ids


def oracle(query, key, value, context, scoring, sinks):
  """Attention of every query by itself, in float64."""
  query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
  positions, segments = np.asarray(context.positions), np.asarray(context.segment_ids)
  out = np.zeros_like(query)
  for b, t, n in np.ndindex(query.shape[:3]):
    k = n // (query.shape[2] // key.shape[2])
    near = positions[b, t] - positions[b] < (scoring.window_tokens or np.inf)
    seen = (segments[b] == segments[b, t]) & (segments[b] > 0) & (positions[b] <= positions[b, t]) & near
    if seen.any():
      scores = key[b, seen, k] @ query[b, t, n] * scoring.scale
      if scoring.soft_cap:
        scores = scoring.soft_cap * np.tanh(scores / scoring.soft_cap)
      weights = np.exp(scores)
      nothing = 0 if sinks is None else np.exp(float(sinks[n]))
      out[b, t, n] = weights / (weights.sum() + nothing) @ value[b, seen, k]
  return out


SINKS = jnp.array([-1.0, 0.0, 1.0, 3.0])
SCORINGS = [
  (Scoring(8**-0.5), None),
  (Scoring(0.2, None, 1), None),
  (Scoring(8**-0.5, None, 4), SINKS),
  (Scoring(8**-0.5, 0.7), SINKS),
]


@pytest.mark.parametrize(("scoring", "sinks"), SCORINGS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_equals_a_loop_over_queries(scoring, sinks, num_kv_heads):
  context = packed_context(5, 1, 9, -3, batch=2)
  arrays = inputs(18, num_kv_heads=num_kv_heads)
  out = attention(*arrays, *where(context), scoring, sinks)
  np.testing.assert_allclose(out, oracle(*arrays, context, scoring, sinks), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("scoring", "sinks"), [(Scoring(8**-0.5), None), (Scoring(0.5, None, 3), SINKS), (Scoring(0.5, 0.7, 200), SINKS)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blockwise_equals_the_plain_form_forward_and_gradient(scoring, sinks, dtype):
  context = packed_context(130, 7, 160, -4, batch=2)
  arrays = [*inputs(301, dtype=dtype), *([] if sinks is None else [sinks])]
  tolerance = {"rtol": 1e-5, "atol": 3e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.05}

  def outputs(function):
    loss = lambda q, k, v, *sinks: jnp.sum(
      jnp.sin(function(q, k, v, *where(context), scoring, *sinks).astype(jnp.float32))
    )
    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays)))))(*arrays)

  both = map(jax.tree.leaves, map(outputs, (blockwise.attention_blockwise, attention)))
  for ours, plain in zip(*both, strict=True):
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), **tolerance)
