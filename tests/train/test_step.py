import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import packed_context, tiny_config
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
  state, _ = jax.jit(make_init(RECIPE, optimizer, seed=0))()

  def run(accumulation_steps):
    step = jax.jit(make_train_step(RECIPE, optimizer, accumulation_steps, seed=0))
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
