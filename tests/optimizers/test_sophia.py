import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import packed_context, tiny_config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.losses.language_modeling import sampled_loss
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.optimizers.sophia import curvature_of, scale_by_sophia
from ultrathink_jax.types import Batch, Output

B, T, D, V = 2, 3, 4, 6
HIDDEN = jax.random.normal(jax.random.key(0), (B, T, D))
TABLE = 0.7 * jax.random.normal(jax.random.key(1), (V, D))
WEIGHTS = jnp.array([[1.0, 0.25, 0.0], [2.0, 1.0, 1.0]])


def softmax_batch():
  tokens = jnp.zeros((B, T), jnp.int32)
  return Batch(tokens, tokens, WEIGHTS, packed_context(T, batch=B))


def test_the_estimate_of_curvature_has_the_diagonal_of_the_gauss_newton_matrix_as_its_mean():
  """For logits linear in the table that matrix is the Hessian, of which the diagonal is worked out exactly."""

  @jax.jit
  def estimate(key):
    output = lambda table: Output(HIDDEN, table, None, None, {}, {})
    loss = lambda table: sampled_loss(output(table), softmax_batch(), key)
    gradients, info = jax.grad(loss, has_aux=True)(TABLE)
    return curvature_of(gradients, info.weight)

  number = 2000
  draws = jax.lax.map(estimate, jax.random.split(jax.random.key(2), number), batch_size=200)

  def mean_loss(flat):
    logits = jnp.einsum("btd,vd->btv", HIDDEN, flat.reshape(V, D))
    return jnp.sum(WEIGHTS * (jax.nn.logsumexp(logits, -1) - logits[..., 0])) / WEIGHTS.sum()

  exact = jnp.diagonal(jax.hessian(mean_loss)(TABLE.reshape(-1))).reshape(V, D)
  error = 5 * draws.std(axis=0) / np.sqrt(number)
  assert np.all(np.abs(draws.mean(axis=0) - exact) < error)
  assert np.mean(error / exact) < 0.3  # or the test could not fail


def test_sophia_follows_its_paper():
  b1, b2, rho, every_steps = 0.965, 0.99, 0.04, 3
  sophia = scale_by_sophia(b1, b2, rho, every_steps)
  gradients = jax.random.normal(jax.random.key(3), (7, 5))
  curvatures = jnp.square(jax.random.normal(jax.random.key(4), (7, 5))) * 300
  state, m, h = sophia.init(jnp.zeros(5)), np.zeros(5), np.zeros(5)
  for t in range(7):
    update, state = sophia.update(gradients[t], state, curvature=lambda t=t: curvatures[t])
    m = b1 * m + (1 - b1) * np.asarray(gradients[t], np.float64)
    if t % every_steps == 0:
      h = b2 * h + (1 - b2) * np.asarray(curvatures[t], np.float64)
    np.testing.assert_allclose(update, np.clip(m / np.maximum(rho * h, 1e-15), -1, 1), rtol=1e-5)
    assert np.sum(np.abs(update) < 1) > 0


def test_curvature_is_worked_out_at_its_steps_only():
  calls, sophia = [], scale_by_sophia(0.9, 0.99, 0.04, 4)

  def curvature():
    jax.debug.callback(lambda: calls.append(1))
    return jnp.ones(3)

  update = jax.jit(lambda state: sophia.update(jnp.ones(3), state, curvature=curvature)[1])
  state = sophia.init(jnp.zeros(3))
  for _ in range(9):
    state = update(state)
  jax.effects_barrier()
  assert len(calls) == 3


def test_an_estimate_that_is_not_finite_leaves_the_curvature_as_it_was():
  sophia = scale_by_sophia(0.9, 0.99, 0.04, 1)
  _, state = sophia.update(jnp.ones(2), sophia.init(jnp.zeros(2)), curvature=lambda: jnp.ones(2))
  update, after = sophia.update(jnp.ones(2), state, curvature=lambda: jnp.array([jnp.nan, 1.0]))
  assert after.nu[0] == state.nu[0] != after.nu[1]
  assert np.isfinite(update).all()


def test_a_recipe_without_samples_is_refused():
  optimizer = make_optimizer(dataclasses.replace(tiny_config().optimizer, name="sophia"), optax.constant_schedule(0.1))
  params = {"x": jnp.ones(2)}
  with pytest.raises(ConfigError, match="'sophia' needs targets drawn from the model"):
    optimizer.update(params, optimizer.init(params), params, step=0)
