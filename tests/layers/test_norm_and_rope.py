import jax
import jax.numpy as jnp
import numpy as np

from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.layers.rope import rotate


def test_rms_norm_equals_its_formula_over_several_dims():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  module = RMSNorm(1e-6, ("heads", "head_dim"))
  y = module.apply({"params": {"scale": jnp.full((4, 5), 2.0)}}, x)
  expected = 2 * x / np.sqrt(np.mean(np.square(x), axis=(2, 3), keepdims=True) + 1e-6)
  np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_rotation_turns_pairs_by_their_angle():
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
  positions = jnp.array([[0, 1, 7]])
  pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
  angles = np.asarray(positions)[..., None, None] * 100.0 ** (-np.arange(4) / 4)
  turned = pairs * np.exp(1j * angles)
  np.testing.assert_allclose(
    rotate(x, positions, 100.0), np.concatenate([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-6
  )
