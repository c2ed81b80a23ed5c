import jax
import jax.numpy as jnp
import numpy as np

from ultrathink_jax.generate.sampling import Sampling, keep_likeliest, penalize, sample

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


def test_top_k_keeps_k_tokens_wherever_they_stand():
  shuffled = LOGITS[:, jnp.array([2, 0, 3, 1])]
  np.testing.assert_array_equal(jnp.isfinite(keep_likeliest(shuffled, 2, 1.0)), [[False, True, False, True]])
  assert bool(jnp.isfinite(keep_likeliest(shuffled, 0, 1.0)).all())


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
  for p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.91, 4), (1.0, 4)):
    assert int(jnp.isfinite(keep_likeliest(LOGITS, 0, p)).sum()) == kept, p


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
  logits, seen = jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]])
  np.testing.assert_allclose(penalize(logits, seen, 2.0), [[1.0, -4.0, 1.0]])
  np.testing.assert_allclose(penalize(logits, seen, 1.0), logits)
