import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.optimizers.optimizers import decay_mask, make_optimizer
from ultrathink_jax.optimizers.schedules import make_schedule


def optimizer_config(**changes):
  return dataclasses.replace(tiny_config().optimizer, **changes)


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_floor():
  config = optimizer_config(learning_rate=1.0, warmup_steps=10, final_learning_rate_ratio=0.1)
  rates = np.array([make_schedule(config, 110)(step) for step in range(111)])
  np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
  cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
  np.testing.assert_allclose(rates[10:], cosine, rtol=1e-5)


def test_a_constant_schedule_stays_at_its_peak():
  schedule = make_schedule(optimizer_config(schedule="constant", learning_rate=0.5, warmup_steps=2), 10)
  np.testing.assert_allclose([schedule(step) for step in range(5)], [0.25, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"schedule": "cos"}, "'cos' is not one of cosine, constant"),
    ({"warmup_steps": 10}, "warmup_steps=10 .* at most 9"),
  ],
)
def test_a_schedule_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    make_schedule(optimizer_config(**changes), 10)


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(ConfigError, match="'adam' is not one of adamw"):
    make_optimizer(optimizer_config(name="adam"), lambda step: 0.1)


def test_weight_decay_reaches_matrices_only():
  params = jax.eval_shape(lambda: init_params(tiny_model(), jax.random.key(0)))
  for path, is_decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_matrix = name.endswith("/kernel") and "conv_" not in name
    assert is_decayed == is_matrix, name
  assert sum(map(bool, jax.tree.leaves(decay_mask(params)))) > 10


def test_adamw_takes_the_published_step_behind_clipping():
  config = optimizer_config(clip_norm=1.0, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
  optimizer = make_optimizer(config, lambda step: 0.01)
  params, gradients = {"w": {"kernel": jnp.array([2.0, -3.0])}}, {"w": {"kernel": jnp.array([30.0, 40.0])}}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  clipped = np.array([0.6, 0.8])
  moment, square = 0.1 * clipped / (1 - 0.9), 0.05 * clipped**2 / (1 - 0.95)
  expected = -0.01 * (moment / (np.sqrt(square) + 1e-8) + 0.1 * np.array([2.0, -3.0]))
  np.testing.assert_allclose(updates["w"]["kernel"], expected, rtol=1e-5)


def bias_params(**others):
  return {"moe_0": {"mixer": {"router_bias": jnp.array([0.5, 0.5, 0.5]), **others}}}


def test_the_bias_of_a_router_moves_by_its_rate_against_the_sign_of_its_gradient():
  optimizer = make_optimizer(optimizer_config(router_bias_rate=0.01), lambda step: 1.0)
  params, gradients = bias_params(), {"moe_0": {"mixer": {"router_bias": 2.0**-80 * jnp.array([3.0, 0.0, -1.0])}}}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  np.testing.assert_allclose(updates["moe_0"]["mixer"]["router_bias"], [-0.01, 0, 0.01], rtol=1e-6)


def test_the_bias_of_a_router_changes_neither_the_other_updates_nor_their_clipping():
  optimizer = make_optimizer(optimizer_config(), lambda step: 1.0)

  def update(params, gradients):
    state = optimizer.init(params)
    for scale in (1, 0.01):  # Adam would not show it if every step were clipped alike
      updates, state = optimizer.update(optax.tree.scale(scale, gradients), state, params)
    return updates["moe_0"]["mixer"]["up"]

  up, gradient = jnp.array([2.0, -3.0]), jnp.array([30.0, 40.0])
  alone = update({"moe_0": {"mixer": {"up": up}}}, {"moe_0": {"mixer": {"up": gradient}}})
  together = update(bias_params(up=up), {"moe_0": {"mixer": {"router_bias": jnp.full(3, 1e3), "up": gradient}}})
  np.testing.assert_allclose(alone, together, rtol=1e-6)
