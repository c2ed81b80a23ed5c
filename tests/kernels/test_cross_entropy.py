import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels import cross_entropy_chunked as chunked
from ultrathink_jax.kernels.cross_entropy import cross_entropy

KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (2, 12, 6))
TABLE = jax.random.normal(KEYS[1], (17, 6))
TARGETS = jax.random.randint(KEYS[2], (2, 12), 0, 17)
WEIGHTS = jax.random.uniform(KEYS[3], (2, 12)).at[0, 3].set(0)


def test_the_plain_form_is_the_negative_log_likelihood():
  logits = np.asarray(HIDDEN, np.float64) @ np.asarray(TABLE, np.float64).T
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  nll = -np.log(np.take_along_axis(p, np.asarray(TARGETS)[..., None], -1))[..., 0]
  np.testing.assert_allclose(cross_entropy(HIDDEN, TABLE, TARGETS, WEIGHTS), (nll * WEIGHTS).sum(), rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 0.8])
@pytest.mark.parametrize(("budget", "block"), [(1, 17), (2 * 17 * 3, 16), (2 * 17 * 5, 17), (10**9, 16)])
def test_chunks_equal_the_plain_form_forward_and_gradient(budget, block, cap, monkeypatch):
  monkeypatch.setattr(chunked, "_MAX_CHUNK_LOGITS", budget)
  monkeypatch.setattr(chunked, "_BLOCK_TOKENS", block)
  scaled = lambda function: lambda hidden, table: 3 * function(hidden, table, TARGETS, WEIGHTS, cap)
  outputs = lambda function: jax.jit(jax.value_and_grad(scaled(function), argnums=(0, 1)))(HIDDEN, TABLE)
  ours, plain = outputs(chunked.cross_entropy_chunked), outputs(cross_entropy)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  alone = chunked.cross_entropy_chunked(HIDDEN, TABLE, TARGETS, WEIGHTS, cap)
  np.testing.assert_allclose(3 * alone, plain[0], rtol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_blocks_whose_logits_are_far_apart_equal_the_plain_form(order, monkeypatch):
  monkeypatch.setattr(chunked, "_BLOCK_TOKENS", 16)
  table = TABLE + 50 * jnp.arange(17)[::order, None] * jnp.ones(6)
  plain, ours = (
    jax.value_and_grad(function, argnums=(0, 1))(HIDDEN, table, TARGETS, WEIGHTS)
    for function in (cross_entropy, chunked.cross_entropy_chunked)
  )
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_gradient_in_bfloat16_stays_true_for_a_token_that_is_almost_sure(monkeypatch):
  monkeypatch.setattr(chunked, "_BLOCK_TOKENS", 16)
  table = jnp.zeros((33, 4)).at[20].set(2.0)  # the logit of token 20 is 8, of all others 0
  hidden, targets, weights = jnp.ones((1, 1, 4), jnp.bfloat16), jnp.full((1, 1), 20), jnp.ones((1, 1))
  gradient = jax.grad(chunked.cross_entropy_chunked, argnums=1)(hidden, table, targets, weights)
  np.testing.assert_allclose(gradient[20], -32 / (32 + np.exp(8)), rtol=0.01)


def test_the_cap_bounds_what_a_wrong_guess_costs():
  loss = cross_entropy(1e3 * HIDDEN, TABLE, TARGETS, WEIGHTS, 0.5)
  assert float(loss) <= (1 + np.log(17)) * float(WEIGHTS.sum())


def test_no_array_of_all_logits_is_made():
  hidden, table = jax.ShapeDtypeStruct((4, 4096, 8), jnp.float32), jax.ShapeDtypeStruct((50_000, 8), jnp.float32)
  targets, weights = jax.ShapeDtypeStruct((4, 4096), jnp.int32), jax.ShapeDtypeStruct((4, 4096), jnp.float32)
  step = jax.jit(jax.grad(chunked.cross_entropy_chunked, argnums=(0, 1)))
  memory = step.lower(hidden, table, targets, weights).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.5 * 4 * 4 * 4096 * 50_000
