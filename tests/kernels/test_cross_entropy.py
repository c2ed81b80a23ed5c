import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels import cross_entropy_chunked as chunked
from ultrathink_jax.kernels.cross_entropy import cross_entropy

KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (2, 12, 6))
KERNEL = jax.random.normal(KEYS[1], (6, 17))
TARGETS = jax.random.randint(KEYS[2], (2, 12), 0, 17)
WEIGHTS = jax.random.uniform(KEYS[3], (2, 12)).at[0, 3].set(0)


def test_the_plain_form_is_the_negative_log_likelihood():
  logits = np.asarray(HIDDEN, np.float64) @ np.asarray(KERNEL, np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  nll = -np.log(np.take_along_axis(p, np.asarray(TARGETS)[..., None], -1))[..., 0]
  np.testing.assert_allclose(cross_entropy(HIDDEN, KERNEL, TARGETS, WEIGHTS), (nll * WEIGHTS).sum(), rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 0.8])
@pytest.mark.parametrize("budget", [1, 2 * 17 * 3, 2 * 17 * 5, 10**9])
def test_chunks_equal_the_plain_form_forward_and_gradient(budget, cap, monkeypatch):
  monkeypatch.setattr(chunked, "_MAX_CHUNK_LOGITS", budget)
  scaled = lambda function: lambda hidden, kernel: 3 * function(hidden, kernel, TARGETS, WEIGHTS, cap)
  outputs = lambda function: jax.jit(jax.value_and_grad(scaled(function), argnums=(0, 1)))(HIDDEN, KERNEL)
  ours, plain = outputs(chunked.cross_entropy_chunked), outputs(cross_entropy)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  alone = chunked.cross_entropy_chunked(HIDDEN, KERNEL, TARGETS, WEIGHTS, cap)
  np.testing.assert_allclose(3 * alone, plain[0], rtol=1e-5)


def test_the_cap_bounds_what_a_wrong_guess_costs():
  loss = cross_entropy(1e3 * HIDDEN, KERNEL, TARGETS, WEIGHTS, 0.5)
  assert float(loss) <= (1 + np.log(17)) * float(WEIGHTS.sum())


def test_no_array_of_all_logits_is_made():
  hidden, kernel = jax.ShapeDtypeStruct((4, 4096, 8), jnp.float32), jax.ShapeDtypeStruct((8, 50_000), jnp.float32)
  targets, weights = jax.ShapeDtypeStruct((4, 4096), jnp.int32), jax.ShapeDtypeStruct((4, 4096), jnp.float32)
  step = jax.jit(jax.grad(chunked.cross_entropy_chunked, argnums=(0, 1)))
  memory = step.lower(hidden, kernel, targets, weights).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.5 * 4 * 4 * 4096 * 50_000
