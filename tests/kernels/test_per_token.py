import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels.per_token import per_token, sum_over_tokens

X = jax.random.normal(jax.random.key(0), (3, 70, 4, 5))


@pytest.mark.parametrize("num_token_dims", [1, 2, 3])
def test_sums_are_those_of_numpy(num_token_dims):
  exact = np.sum(np.asarray(X, np.float64), axis=tuple(range(num_token_dims)))
  np.testing.assert_allclose(sum_over_tokens(X, num_token_dims), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sums_are_weighted(platform, monkeypatch):
  monkeypatch.setattr("ultrathink_jax.kernels.per_token.target_platform", lambda: platform)
  weights = np.random.default_rng(0).normal(size=X.shape[:2])
  exact = np.einsum("bt,bthd->hd", weights, np.asarray(X, np.float64))
  np.testing.assert_allclose(sum_over_tokens(X, 2, jnp.asarray(weights)), exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
  ones = jnp.ones((8, 512, 2), jnp.bfloat16)  # of which bfloat16 could count to 256
  np.testing.assert_array_equal(sum_over_tokens(ones), [4096.0, 4096.0])


def test_a_parameter_meets_each_token_and_gathers_their_gradients():
  scale = jnp.arange(1.0, 21.0).reshape(4, 5)
  by_token = lambda scale: jnp.sum(jnp.sin(X * per_token(scale, X.shape[:2])))
  by_broadcast = lambda scale: jnp.sum(jnp.sin(X * scale))
  np.testing.assert_array_equal(by_token(scale), by_broadcast(scale))
  np.testing.assert_allclose(jax.grad(by_token)(scale), jax.grad(by_broadcast)(scale), rtol=1e-5, atol=1e-5)


def test_the_gradient_has_the_dtype_of_the_parameter():
  scale = jnp.ones((4, 5), jnp.bfloat16)
  gradient = jax.grad(lambda scale: jnp.sum(per_token(scale, (3, 70)).astype(jnp.float32)))(scale)
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient, np.full((4, 5), 210.0))
