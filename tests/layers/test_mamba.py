import jax
import jax.numpy as jnp
import numpy as np

from ultrathink_jax.layers.mamba import init_a_log, init_dt_bias


def test_initial_steps_are_log_uniform_between_a_thousandth_and_a_tenth():
  dt = np.asarray(jax.nn.softplus(init_dt_bias(jax.random.key(0), (10_000,), jnp.float32)))
  assert dt.min() > 0.00099
  assert dt.max() < 0.101
  np.testing.assert_allclose(np.quantile(np.log10(dt), [0.25, 0.5, 0.75]), [-2.5, -2.0, -1.5], atol=0.05)


def test_initial_decay_rates_are_uniform_between_one_and_sixteen():
  rates = np.exp(init_a_log(jax.random.key(0), (10_000,), jnp.float32))
  np.testing.assert_allclose(np.quantile(rates, [0, 0.5, 1]), [1, 8.5, 16], atol=0.3)
