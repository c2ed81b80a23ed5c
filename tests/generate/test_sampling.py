import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.generate.sampling import Sampling, _draw, keep_likeliest, penalize, sample

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.1])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))[None]
NOTHING_SEEN = jnp.zeros((1, 4), bool)


def frequencies(logits, sampling, num=4000):
  keys = jax.random.split(jax.random.key(0), num)
  tokens = sample(keys, jnp.repeat(logits, num, 0), jnp.repeat(NOTHING_SEEN, num, 0), sampling)
  return np.bincount(tokens, minlength=4) / num


def test_sampling_follows_the_distribution():
  np.testing.assert_allclose(frequencies(LOGITS, Sampling(False, 1.0, 0, 1.0, 1.0)), PROBABILITIES, atol=0.03)


def test_temperature_sharpens_the_distribution():
  expected = PROBABILITIES**2 / np.sum(PROBABILITIES**2)
  np.testing.assert_allclose(frequencies(LOGITS, Sampling(False, 0.5, 0, 1.0, 1.0)), expected, atol=0.03)


def test_greedy_takes_the_likeliest():
  np.testing.assert_array_equal(frequencies(LOGITS, Sampling(True, 0.0, 0, 1.0, 1.0), 3), [1, 0, 0, 0])


draw = jax.jit(sample)


def reference(logits, top_k, top_p):
  """Returns the probabilities that NumPy, in float64, gives the tokens of a row, by ranking all of them."""
  order = np.argsort(-logits, kind="stable")
  ranked = np.exp(logits[order].astype(np.float64) - logits.max())
  ranked[top_k or logits.size :] = 0
  ranked[(np.cumsum(ranked) - ranked >= top_p * ranked.sum()) & (np.arange(logits.size) > 0)] = 0
  return (ranked / ranked.sum())[np.argsort(order)]


@pytest.mark.parametrize("top_k", [0, 1, 7, 300, 600])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("spread", [0.2, 4.0])  # flat: the likeliest 256 of 1000 do not reach 0.9
def test_any_top_k_and_top_p_draw_from_the_distribution_that_ranking_all_tokens_gives(top_k, top_p, spread):
  logits = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32) * spread
  num = 4000
  keys = jax.random.split(jax.random.key(1), num)
  rows, nothing_seen = jnp.repeat(jnp.asarray(logits), num, 0), jnp.zeros((num, 1000), bool)
  tokens = draw(keys, rows, nothing_seen, Sampling(False, 1.0, top_k, top_p, 1.0))
  counts = np.bincount(tokens, minlength=1000)
  assert not counts[reference(logits[0], top_k, top_p * 1.0001) == 0].any()
  distance = np.abs(np.cumsum(counts / num - reference(logits[0], top_k, top_p))).max()
  assert distance < 2 / num**0.5  # Kolmogorov's statistic exceeds this one time in a thousand


def test_a_row_draws_the_same_token_whatever_stands_beside_it():
  rng = np.random.default_rng(0)
  flat, peaked = (jnp.asarray(rng.normal(size=(1, 1000)), jnp.float32) * spread for spread in (0.2, 8.0))
  keys, seen = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 1000), bool)
  for top_k, top_p in ((0, 1.0), (0, 0.9), (50, 0.9), (400, 0.9)):
    sampling = Sampling(False, 1.0, top_k, top_p, 1.0)
    together = draw(keys, jnp.concatenate([flat, peaked]), seen, sampling)
    alone = [draw(keys[i : i + 1], row, seen[:1], sampling)[0] for i, row in enumerate((flat, peaked))]
    np.testing.assert_array_equal(together, alone)


def test_a_place_of_weight_0_is_never_drawn_at_either_end():
  weights = jnp.zeros((2, 600)).at[:, jnp.array([3, 300, 599 - 40])].set(jnp.array([1.0, 1e-7, 1.0]))
  np.testing.assert_array_equal(_draw(weights, jnp.array([0.0, 1 - 2**-23])), [3, 559])


def test_greedy_takes_the_first_of_equals_as_argmax_does():
  logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-jnp.inf, -5.0, -5.0, -7.0]])
  tokens = sample(
    jax.random.split(jax.random.key(0), 3), logits, jnp.zeros((3, 4), bool), Sampling(True, 0.0, 0, 1.0, 1.0)
  )
  np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))


def test_top_k_keeps_the_first_k():
  kept = keep_likeliest(jnp.asarray(PROBABILITIES)[None], jnp.ones(1), 2, 1.0)
  np.testing.assert_allclose(kept, [[0.5, 0.25, 0, 0]])


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
  for p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.91, 4), (1.0, 4)):
    assert int((keep_likeliest(jnp.asarray(PROBABILITIES)[None], jnp.ones(1), 4, p) > 0).sum()) == kept, p


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
  logits, seen = jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]])
  np.testing.assert_allclose(penalize(logits, seen, 2.0), [[1.0, -4.0, 1.0]])
  np.testing.assert_allclose(penalize(logits, seen, 1.0), logits)
