import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.conftest import packed_context, tiny_config, tiny_model
from ultrathink_jax.optimizers.averaging import averaged
from ultrathink_jax.optimizers.optimizers import OPTIMIZERS, make_optimizer
from ultrathink_jax.optimizers.sophia import curvature_of
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.types import Batch

RATES = {"sgd": 0.1, "lion": 1e-3, "galore": 1e-2}


@pytest.fixture(scope="module")
def language_model():
  """Returns parameters, their loss per token with gradients, and the curvature, of sentences that count upwards."""
  config = dataclasses.replace(tiny_config(), model=tiny_model(layers="(ME)x2", vocab_size=16))
  recipe = make_pretrain(config)
  tokens = (jnp.arange(8)[:, None] + jnp.arange(12)) % 16
  batch = Batch(tokens, (tokens + 1) % 16, jnp.ones((8, 12)), packed_context(12, batch=8))
  params, _ = jax.jit(recipe.init)(jax.random.key(0))

  @jax.jit
  def loss_and_gradients(params):
    (loss, info), gradients = jax.value_and_grad(recipe.loss, has_aux=True)(
      params, None, batch, jnp.int32(0), jax.random.key(0)
    )
    return loss / info.weight, jax.tree.map(lambda g: g / info.weight, gradients)

  @jax.jit
  def curvature(params, key):
    gradients, info = jax.grad(recipe.sampled_loss, has_aux=True)(params, None, batch, jnp.int32(0), key)
    return curvature_of(gradients, info.weight)

  return params, loss_and_gradients, curvature


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_lowers_the_loss_of_a_language_model(name, language_model):
  params, loss_and_gradients, curvature = language_model
  config = dataclasses.replace(tiny_config().optimizer, name=name, schedule="constant")
  config = dataclasses.replace(config, galore=dataclasses.replace(config.galore, rank=4, every_steps=10))
  optimizer = make_optimizer(config, optax.constant_schedule(RATES.get(name, 3e-3)))
  state = jax.jit(optimizer.init)(params)
  update = jax.jit(lambda g, s, p, h: optimizer.update(g, s, p, curvature=lambda: h))
  before, _ = loss_and_gradients(params)
  estimate = params
  for step in range(25):
    _, gradients = loss_and_gradients(params)
    if name == "sophia" and step % config.sophia.every_steps == 0:
      estimate = curvature(params, jax.random.key(step))
    updates, state = update(gradients, state, params, estimate)
    params = optax.apply_updates(params, updates)
  found = averaged(state, params)
  after, _ = loss_and_gradients(params if found is None else found)
  assert after < 0.8 * before
