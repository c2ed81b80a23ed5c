import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from ultrathink_jax.config import RopeConfig, from_mapping
from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.layers.rope import rotate, rotation


def test_rms_norm_equals_its_formula_over_several_dims():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  module = RMSNorm(1e-6, ("heads", "head_dim"))
  y = module.apply({"params": {"scale": jnp.full((4, 5), 2.0)}}, x)
  expected = 2 * x / np.sqrt(np.mean(np.square(x), axis=(2, 3), keepdims=True) + 1e-6)
  np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_groups_of_a_norm_have_means_of_their_own():
  x = jax.random.normal(jax.random.key(0), (2, 4, 6)) * jnp.array([1, 1, 100, 100])[:, None]
  params = {"params": {"scale": jnp.ones((4, 6))}}
  y = RMSNorm(1e-6, ("heads", "head_dim"), num_groups=2).apply(params, x)
  for part in (slice(0, 2), slice(2, 4)):
    expected = x[:, part] / np.sqrt(np.mean(np.square(x[:, part]), axis=(1, 2), keepdims=True) + 1e-6)
    np.testing.assert_allclose(y[:, part], expected, rtol=1e-5)


def rope(**changes) -> RopeConfig:
  return from_mapping(base.get_config().model.rope.to_dict() | {"theta": 100.0} | changes, RopeConfig)


def turned(x, positions, frequencies, magnitude=1.0):
  """Complex rotation of the first dims of each head."""
  pairs = len(frequencies)
  numbers = np.asarray(x[..., :pairs]) + 1j * np.asarray(x[..., pairs : 2 * pairs])
  numbers *= magnitude * np.exp(1j * np.asarray(positions)[..., None, None] * frequencies)
  return np.concatenate([numbers.real, numbers.imag, x[..., 2 * pairs :]], -1)


X = jax.random.normal(jax.random.key(0), (1, 3, 2, 16))
POSITIONS = jnp.array([[0, 1, 70]])
PLAIN = 100.0 ** (-np.arange(8) / 8)


def rotated(settings):
  return rotate(X, rotation(POSITIONS, X.shape[-1], settings))


def test_rotation_turns_pairs_by_their_angle():
  np.testing.assert_allclose(rotated(rope()), turned(X, POSITIONS, PLAIN), rtol=1e-4, atol=1e-5)


def test_a_fraction_of_the_dims_turns_and_the_rest_stays():
  expected = turned(X, POSITIONS, 100.0 ** (-np.arange(4) / 4))
  np.testing.assert_allclose(rotated(rope(fraction=0.5)), expected, rtol=1e-4, atol=1e-5)


def test_linear_scaling_divides_positions():
  scaled = rotated(rope(scaling="linear", factor=4.0))
  np.testing.assert_allclose(scaled, turned(X, POSITIONS / 4, PLAIN), rtol=1e-4, atol=1e-5)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies():
  settings = rope(scaling="llama3", factor=8.0, original_tokens=64)
  turns = 64 * PLAIN / (2 * np.pi)
  expected = np.where(turns > 4, PLAIN, np.where(turns < 1, PLAIN / 8, 0))
  blend = (turns - 1) / 3
  expected = np.where(expected == 0, (1 - blend) * PLAIN / 8 + blend * PLAIN, expected)
  assert np.unique(np.sign(turns - 4) + np.sign(turns - 1)).size == 3
  np.testing.assert_allclose(rotated(settings), turned(X, POSITIONS, expected), rtol=1e-4, atol=1e-5)


def test_yarn_blends_by_dim_and_raises_the_magnitude():
  settings = rope(scaling="yarn", factor=4.0, original_tokens=256, beta_fast=8.0, beta_slow=1.0)
  dim = lambda turns: 8 * np.log(256 / (turns * 2 * np.pi)) / np.log(100.0)
  ramp = np.clip((np.arange(8) - np.floor(dim(8))) / (np.ceil(dim(1)) - np.floor(dim(8))), 0, 1)
  frequencies = PLAIN * (1 - ramp) + PLAIN / 4 * ramp
  expected = turned(X, POSITIONS, frequencies, 0.1 * np.log(4) + 1)
  np.testing.assert_allclose(rotated(settings), expected, rtol=1e-4, atol=1e-5)


def test_dynamic_scaling_begins_behind_the_original_context():
  settings = lambda tokens: rope(scaling="dynamic", factor=2.0, original_tokens=tokens)
  np.testing.assert_allclose(rotated(settings(71)), turned(X, POSITIONS, PLAIN), rtol=1e-4, atol=1e-5)
  theta = 100.0 * (2 * 71 / 32 - 1) ** (16 / 14)
  expected = turned(X, POSITIONS, theta ** (-np.arange(8) / 8))
  np.testing.assert_allclose(rotated(settings(32)), expected, rtol=1e-4, atol=1e-5)
