import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels import cross_entropy_chunked as chunked
from ultrathink_jax.kernels.cross_entropy import token_losses

KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (2, 12, 6))
TABLE = jax.random.normal(KEYS[1], (17, 6))
TARGETS = jax.random.randint(KEYS[2], (2, 12), 0, 17)
WEIGHTS = jax.random.uniform(KEYS[3], (2, 12)).at[0, 3].set(0)


def test_smoothed_losses_are_cross_entropies_with_mixed_targets():
  logits = np.asarray(HIDDEN, np.float64) @ np.asarray(TABLE, np.float64).T
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  mixed = 0.9 * np.eye(17)[np.asarray(TARGETS)] + 0.1 / 17
  expected = -np.sum(np.asarray(WEIGHTS)[..., None] * mixed * logs)
  expected += 0.01 * np.sum(np.asarray(WEIGHTS) * np.log(np.exp(logits).sum(-1)) ** 2)
  total, losses = chunked.token_loss_chunked(HIDDEN, TABLE, TARGETS, WEIGHTS, None, 0.1, 0.01)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  np.testing.assert_allclose(0.9 * losses.target + 0.1 * losses.even + 0.01 * losses.z, expected, rtol=1e-5)


@pytest.mark.parametrize(("smoothing", "z_weight"), [(0.2, 0.0), (0.0, 0.3), (0.2, 0.3)])
@pytest.mark.parametrize("cap", [None, 0.8])
@pytest.mark.parametrize(("budget", "block"), [(2 * 17 * 3, 16), (10**9, 17)])
def test_chunks_with_smoothing_and_z_equal_the_plain_form(budget, block, cap, smoothing, z_weight, monkeypatch):
  monkeypatch.setattr(chunked, "_MAX_CHUNK_LOGITS", budget)
  monkeypatch.setattr(chunked, "_BLOCK_TOKENS", block)
  mix = smoothing, z_weight
  ours = lambda *args: chunked.token_loss_chunked(*args, TARGETS, WEIGHTS, cap, *mix)
  plain = lambda *args: token_losses(*args, TARGETS, WEIGHTS, cap, *mix).total(*mix)
  (total, losses), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(HIDDEN, TABLE)
  expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(HIDDEN, TABLE)
  for a, b in zip(jax.tree.leaves((total, gradients)), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  for a, b in zip(losses, token_losses(HIDDEN, TABLE, TARGETS, WEIGHTS, cap, *mix), strict=True):
    assert (a is None) == (b is None)
    if a is not None:
      np.testing.assert_allclose(a, b, rtol=1e-5)


def test_what_has_no_weight_is_not_worked_out():
  plain = jax.make_jaxpr(jax.grad(chunked.cross_entropy_chunked))(HIDDEN, TABLE, TARGETS, WEIGHTS)
  mixed = lambda *mix: jax.make_jaxpr(
    jax.grad(lambda *args: chunked.token_loss_chunked(*args, None, *mix), has_aux=True)
  )(HIDDEN, TABLE, TARGETS, WEIGHTS)
  count = lambda jaxpr: str(jaxpr).count(" = ")
  without, with_z, smoothed = (count(mixed(*mix)) for mix in ((0.0, 0.0), (0.0, 0.1), (0.1, 0.0)))
  assert without - count(plain) <= 1  # the sums are not followed by gradients
  assert min(with_z, smoothed) > without


def test_tokens_are_drawn_from_the_softmax(monkeypatch):
  monkeypatch.setattr(chunked, "_MAX_CHUNK_LOGITS", 2 * 17 * 3)
  draw = jax.jit(jax.vmap(lambda key: chunked.sample_tokens(HIDDEN, TABLE, 2.0, key)))
  number = 2000
  tokens = draw(jax.random.split(jax.random.key(5), number))
  share = np.mean(np.asarray(tokens)[..., None] == np.arange(17), axis=0)
  expected = jax.nn.softmax(2 * jnp.tanh(jnp.einsum("btd,vd->btv", HIDDEN, TABLE) / 2), axis=-1)
  assert np.abs(share - expected).max() < 5 * 0.5 / np.sqrt(number)
  assert not np.array_equal(tokens[0], tokens[1])
