import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.optimizers.averaging import averaged
from ultrathink_jax.optimizers.optimizers import make_optimizer


def optimizer_config(**changes):
  defaults = {"name": "sgd", "beta1": 0.0, "weight_decay": 0.0, "clip_norm": 1e9, "schedule": "constant"}
  return dataclasses.replace(tiny_config().optimizer, **defaults | changes)


def descend(optimizer, params, gradients):
  """Returns the parameters after each update and the last state."""
  state, seen = optimizer.init(params), []
  update = jax.jit(optimizer.update)
  for step, gradient in enumerate(gradients):
    updates, state = update(gradient, state, params, step=jnp.int32(step))
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen, state


def draws(number, *shape):
  return [{"x": g} for g in jax.random.normal(jax.random.key(0), (number, *shape))]


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_the_average_has_its_closed_form_with_the_warm_up_of_its_decay(decay):
  start = {"x": jnp.array([5.0, -3.0])}
  seen, state = descend(make_optimizer(optimizer_config(average_decay=decay), lambda step: 0.1), start, draws(30, 2))
  kept = np.minimum(decay, (1 + np.arange(30)) / (10 + np.arange(30)))
  left = np.append(np.cumprod(kept[::-1])[::-1][1:], 1)  # of what update t puts in, after the last one
  expected = np.prod(kept) * np.asarray(start["x"])
  expected = expected + sum(w * (1 - k) * np.asarray(p["x"]) for w, k, p in zip(left, kept, seen, strict=True))
  np.testing.assert_allclose(averaged(state, seen[-1])["x"], expected, rtol=1e-5)


def test_an_average_changes_no_update():
  start, gradients = {"x": jnp.ones(3)}, draws(5, 3)
  plain, _ = descend(make_optimizer(optimizer_config(name="adamw"), lambda step: 0.1), start, gradients)
  config = optimizer_config(name="adamw", average_decay=0.9)
  with_average, _ = descend(make_optimizer(config, lambda step: 0.1), start, gradients)
  np.testing.assert_array_equal(plain[-1]["x"], with_average[-1]["x"])


def test_without_an_average_there_are_no_averaged_parameters():
  params = {"x": jnp.ones(3)}
  assert averaged(make_optimizer(optimizer_config(), lambda step: 0.1).init(params), params) is None


def test_schedule_free_follows_its_paper():
  """z descends, x averages z by the squared rate, gradients are taken at y between them (arXiv:2405.15682)."""
  rates, beta, beta2 = np.minimum(np.arange(1, 9) / 4, 1) * 0.1, 0.9, 0.99
  config = optimizer_config(name="schedule_free", beta1=beta, beta2=beta2, weight_decay=0.0, epsilon=1e-8)
  gradients = draws(8, 3)
  optimizer = make_optimizer(config, lambda step: jnp.asarray(rates)[step])
  seen, state = descend(optimizer, {"x": jnp.ones(3)}, gradients)
  z = x = np.ones(3)
  square, weights = 0.0, 0.0
  for t, gradient in enumerate(gradients):
    g = np.asarray(gradient["x"], np.float64)
    square = beta2 * square + (1 - beta2) * g**2
    z = z - rates[t] * g / (np.sqrt(square / (1 - beta2 ** (t + 1))) + 1e-8)
    weights += rates[t] ** 2
    x = x + rates[t] ** 2 / weights * (z - x)
    np.testing.assert_allclose(seen[t]["x"], (1 - beta) * z + beta * x, rtol=1e-4)
  np.testing.assert_allclose(averaged(state, seen[-1])["x"], x, rtol=1e-4)


def test_schedule_free_evaluates_with_the_bias_of_routers_as_it_is():
  params = {"moe_0": {"mixer": {"router_bias": jnp.zeros(2), "up": jnp.ones(2)}}}
  optimizer = make_optimizer(optimizer_config(name="schedule_free", beta1=0.9), lambda step: 0.1)
  gradients = {"moe_0": {"mixer": {"router_bias": jnp.array([1.0, -1.0]), "up": jnp.ones(2)}}}
  seen, state = descend(optimizer, params, [gradients] * 3)
  params = seen[-1]
  mixer = averaged(state, params)["moe_0"]["mixer"]
  np.testing.assert_array_equal(mixer["router_bias"], params["moe_0"]["mixer"]["router_bias"])
  assert not np.allclose(mixer["up"], params["moe_0"]["mixer"]["up"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"schedule": "cosine", "beta1": 0.9}, "schedule='cosine' .* set --config.optimizer.schedule=constant"),
    ({"beta1": 0.0}, "beta1=0.0"),
    ({"average_decay": 0.9, "beta1": 0.9}, "average_decay=0.9"),
    ({"moment_dtype": "bfloat16", "beta1": 0.9}, "no first moment; set it to 'float32', or choose one of adamw, lion"),
  ],
)
def test_what_does_not_go_with_schedule_free_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    make_optimizer(optimizer_config(name="schedule_free", **changes), lambda step: 0.1)
