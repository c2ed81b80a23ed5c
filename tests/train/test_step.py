import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import packed_context, tiny_config, tiny_model
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.train.state import make_init
from ultrathink_jax.train.step import make_train_step
from ultrathink_jax.types import Batch

CONFIG = tiny_config()
RECIPE = make_pretrain(CONFIG)


def ragged_batch():
  """Eight rows whose weights differ and are partly 0."""
  tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)
  weights = jax.random.uniform(jax.random.key(2), (8, 12)) * (jnp.arange(12) < jnp.arange(5, 13)[:, None])
  return Batch(tokens, jnp.roll(tokens, -1, axis=1), weights.at[3].set(0), packed_context(7, 5, batch=8))


@pytest.fixture(scope="module")
def one_step():
  """Returns accumulation steps -> (gradient, metrics), through an optimizer whose update is the gradient."""
  optimizer = optax.sgd(1.0)
  state, _ = jax.jit(make_init(CONFIG, RECIPE, optimizer))()

  def run(accumulation_steps):
    config = tiny_config(train={"accumulation_steps": accumulation_steps})
    step = jax.jit(make_train_step(config, RECIPE, optimizer))
    after, metrics = step(state, None, ragged_batch())
    return jax.tree.map(jnp.subtract, state.params, after.params), metrics

  return run


def test_accumulation_changes_neither_the_loss_nor_the_update(one_step):
  whole, metrics = one_step(1)
  for steps in (2, 4, 8):
    parts, part_metrics = one_step(steps)
    for name, value in metrics.items():
      np.testing.assert_allclose(part_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_parts_of_the_loss_sum_to_the_total(one_step):
  _, metrics = one_step(1)
  parts = metrics["loss/lm"] + 0.01 * metrics["loss/load_balance"] + 0.001 * metrics["loss/router_z"]
  np.testing.assert_allclose(metrics["loss/total"], parts, rtol=1e-6)
  values = RECIPE.summarize(jax.device_get(metrics))
  np.testing.assert_allclose(values["loss"], metrics["loss/lm"] / metrics["weight"], rtol=1e-6)
  assert 0.5 < values["moe/entropy"] <= 1
  assert abs(sum(values["moe/load"]["layers.3"]) - 1) < 1e-5


def test_the_bias_of_a_router_follows_the_load_of_the_whole_batch_however_it_is_split():
  config = tiny_config(optimizer={"router_bias_rate": 0.25})
  config = dataclasses.replace(config, model=tiny_model(layers="(EE)x2", router="sigmoid", router_bias=True))
  recipe = make_pretrain(config)
  optimizer = make_optimizer(config.optimizer, lambda step: 1e-3)
  state, _ = jax.jit(make_init(config, recipe, optimizer))()
  for accumulation_steps in (1, 4):
    train = dataclasses.replace(config.train, accumulation_steps=accumulation_steps)
    step = jax.jit(make_train_step(dataclasses.replace(config, train=train), recipe, optimizer))
    after, metrics = step(state, None, ragged_batch())
    for name in ("moe_0", "moe_1"):
      load = np.asarray(metrics[f"moe/load/group_0/{name}"])
      moved = -0.25 * np.sign(load - load.mean(axis=1, keepdims=True))
      assert len(np.unique(moved)) > 1
      np.testing.assert_array_equal(after.params["group_0"][name]["mixer"]["router_bias"], moved)


def test_noise_of_the_router_follows_the_step_and_ends():
  def make_loss(**changes):
    recipe = make_pretrain(dataclasses.replace(CONFIG, model=tiny_model(layers="E", **changes)))
    params, _ = jax.jit(recipe.init)(jax.random.key(0))
    loss = jax.jit(recipe.loss)
    return lambda step, seed=1: float(loss(params, None, ragged_batch(), jnp.int32(step), jax.random.key(seed))[0])

  quiet, noisy = make_loss()(0), make_loss(router_noise=2.0, router_noise_steps=10)
  assert abs(noisy(0) - quiet) > 1e-4 * quiet
  assert noisy(0) != noisy(0, seed=2)
  np.testing.assert_allclose([noisy(10), noisy(1000)], [quiet, quiet], rtol=1e-6)
