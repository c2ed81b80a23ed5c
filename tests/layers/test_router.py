import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.layers.router import (
  Logits,
  RouterConfig,
  bias_step,
  draw_noise,
  noise_deviation,
  route,
  routing_losses,
)

SIZES = (4, 2, 1, 1)
STARTS = np.cumsum((0, *SIZES))
LOSSES = ("load_balance", "router_z", "router_importance", "router_entropy")


class Found(NamedTuple):
  choices: jax.Array
  gates: jax.Array
  losses: dict[str, jax.Array]


@partial(jax.jit, static_argnums=4)
def run(logits, noise, bias, is_token, config):
  routing = route(logits, noise, bias, config)
  return Found(*routing[:2], routing_losses(routing, is_token, logits.experts.shape[-1]))


def settings(**changes):
  config = {"name": "softmax", "experts_per_token": 2, "normalize": True, "multiplier": 1.0, "has_bias": False}
  return RouterConfig(**{**config, "group_sizes": (), **changes})


def routed(experts, groups=None, noise=None, bias=None, is_token=None, **changes):
  """Returns what a softmax router with two choices finds, or a grouped one if there are logits of groups."""
  grouped = {} if groups is None else {"name": "grouped", "group_sizes": SIZES}
  if is_token is None:
    is_token = jnp.ones(experts.shape[:2], bool)
  return run(Logits(experts, groups), noise, bias, is_token, settings(**grouped, **changes))


def random_logits(num_options, scale=1.0, seed=0, shape=(2, 50)):
  return scale * jax.random.normal(jax.random.key(seed), (*shape, num_options))


def softmax(x):
  x = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def best(scores, K=2):
  order = np.argsort(-scores, axis=-1)[..., :K]
  return order, np.take_along_axis(np.asarray(scores), order, -1)


def product_of_levels(experts, groups):
  """p(group) p(expert | group), expert by expert, with groups as likely as they are large where logits are 0."""
  group = softmax(groups + np.log(SIZES))
  inside = [softmax(experts[..., a:b]) for a, b in itertools.pairwise(STARTS)]
  return np.concatenate([group[..., g, None] * inside[g] for g in range(len(SIZES))], -1)


def test_softmax_gates_are_the_softmax_of_the_best_logits():
  logits = random_logits(8)
  order, top = best(np.asarray(logits))
  routing = routed(logits)
  np.testing.assert_array_equal(routing.choices, order)
  np.testing.assert_allclose(routing.gates, softmax(top), rtol=1e-5)


def test_gates_that_are_not_normalised_are_the_probabilities_times_the_multiplier():
  logits = random_logits(8)
  _, top = best(softmax(logits))
  np.testing.assert_allclose(routed(logits, normalize=False, multiplier=2.5).gates, 2.5 * top, rtol=1e-5)
  assert top.sum(-1).max() < 0.95


def test_sigmoid_scores_are_ranked_with_the_bias_and_gate_without_it():
  logits, bias = random_logits(8), jnp.linspace(-0.3, 0.3, 8)
  scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  order, _ = best(scores + np.asarray(bias))
  assert (order != best(scores)[0]).any()
  top = np.take_along_axis(scores, order, -1)
  routing = routed(logits, name="sigmoid", bias=bias, multiplier=2.0)
  np.testing.assert_array_equal(routing.choices, order)
  np.testing.assert_allclose(routing.gates, 2 * top / top.sum(-1, keepdims=True), rtol=1e-5)


def test_a_bias_moves_the_choice_of_a_softmax_router_and_not_its_gates():
  logits = random_logits(8)
  routing = routed(logits, bias=jnp.zeros(8).at[3].set(2.0), normalize=False)
  assert (routing.choices[..., 0] == 3).all()
  np.testing.assert_allclose(routing.gates[..., 0], softmax(logits)[..., 3], rtol=1e-5)


def test_grouped_scores_are_those_of_the_group_times_those_inside_it():
  experts, groups = random_logits(8), random_logits(4, seed=1)
  order, top = best(product_of_levels(experts, groups))
  routing = routed(experts, groups)
  np.testing.assert_array_equal(routing.choices, order)
  np.testing.assert_allclose(routing.gates, top / top.sum(-1, keepdims=True), rtol=1e-5)


def test_a_grouped_router_without_an_opinion_scores_all_experts_alike():
  routing = routed(jnp.zeros((1, 1, 8)), jnp.zeros((1, 1, 4)), experts_per_token=8, normalize=False)
  np.testing.assert_allclose(routing.gates, 1 / 8, rtol=1e-6)


@pytest.mark.parametrize("groups", [None, 4])
def test_an_even_router_loses_one_and_nothing_else(groups):
  logits = lambda n, seed: random_logits(n, 1e-3, seed, (2, 4000))
  found = routed(logits(8, 0), None if groups is None else logits(groups, 1)).losses
  np.testing.assert_allclose(found["load_balance"], 1, rtol=0.01)
  np.testing.assert_allclose(found["router_importance"], 0, atol=1e-3)
  np.testing.assert_allclose(found["router_entropy"], 0, atol=1e-3)


def test_a_collapsed_router_loses_more():
  found = routed(jnp.zeros((2, 50, 8)).at[..., :2].set(20.0)).losses
  np.testing.assert_allclose(found["load_balance"], 8 / 2, rtol=1e-3)
  np.testing.assert_allclose(found["router_importance"], 8 / 2 - 1, rtol=1e-3)
  np.testing.assert_allclose(found["router_entropy"], 1 - np.log(2) / np.log(8), rtol=1e-3)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_losses_of_a_flat_router_equal_their_formulas_row_by_row(name):
  logits, is_token = random_logits(8, 2.0), jnp.arange(50) < jnp.array([[30], [50]])
  routing = routed(logits, name=name, is_token=is_token)
  for row, count in enumerate((30, 50)):
    x = np.asarray(logits[row, :count], np.float64)
    p = softmax(x) if name == "softmax" else 1 / (1 + np.exp(-x))
    p /= p.sum(-1, keepdims=True)
    f = np.bincount(np.asarray(routing.choices[row, :count]).ravel(), minlength=8) / (2 * count)
    P = p.mean(0)
    expected = {
      "load_balance": 8 * np.sum(f * P),
      "router_z": np.mean(np.log(np.exp(x).sum(-1)) ** 2),
      "router_importance": np.var(P) / np.mean(P) ** 2,
      "router_entropy": 1 - np.mean(-np.sum(p * np.log(p), -1)) / np.log(8),
    }
    for loss, value in expected.items():
      np.testing.assert_allclose(routing.losses[loss][row], value, rtol=1e-4, err_msg=loss)


def test_losses_of_a_grouped_router_are_means_over_the_choices_it_makes():
  experts, groups = random_logits(8, 2.0), random_logits(4, 2.0, seed=1)
  routing = routed(experts, groups)
  p = softmax(groups + np.log(SIZES))
  for row in range(2):
    load = np.bincount(np.asarray(routing.choices[row]).ravel(), minlength=8)
    even, P = np.array(SIZES) / 8, p[row].mean(0)
    f = np.add.reduceat(load, STARTS[:-1]) / load.sum()
    relative = np.sum(p[row] * np.log(p[row] / even), -1).mean() / np.log(8)
    balance, z = [np.sum(f * P / even)], [np.mean(np.log(np.exp(groups[row]).sum(-1)) ** 2)]
    importance, entropy = [np.sum((P / even - 1) ** 2 * even)], [relative]
    for g in (0, 1):
      x, E = np.asarray(experts[row, :, STARTS[g] : STARTS[g + 1]], np.float64), SIZES[g]
      reach = p[row, :, g] / p[row, :, g].sum()
      f, q = load[STARTS[g] : STARTS[g + 1]] / load[STARTS[g] : STARTS[g + 1]].sum(), softmax(x)
      P = reach @ q
      balance.append(E * np.sum(f * P))
      z.append(reach @ np.log(np.exp(x).sum(-1)) ** 2)
      importance.append(np.var(P) / np.mean(P) ** 2)
      entropy.append(1 + reach @ np.sum(q * np.log(q), -1) / np.log(E))
    for loss, values in zip(LOSSES, (balance, z, importance, entropy), strict=True):
      np.testing.assert_allclose(routing.losses[loss][row], np.mean(values), rtol=1e-4, err_msg=loss)


def test_a_group_of_one_expert_has_no_level_and_no_loss():
  experts, groups = random_logits(8), random_logits(4, seed=1)
  routing = route(Logits(experts, groups), None, None, settings(name="grouped", group_sizes=SIZES))
  assert [level.members.sum(1).tolist() for level in routing.levels] == [[4, 2, 1, 1], [1] * 4, [1] * 2]
  found = routed(experts.at[..., 6:].set(9.0), groups).losses
  for name, values in routed(experts, groups).losses.items():
    np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_router_of_one_expert_has_no_loss():
  found = routed(random_logits(1), experts_per_token=1).losses
  assert [float(found[name].sum()) for name in LOSSES] == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_z_loss_grows_with_the_scale_of_the_logits(name):
  small, large = (routed(random_logits(8, scale), name=name).losses["router_z"] for scale in (1, 100))
  assert (large > 500 * small).all()


def test_losses_and_their_gradients_are_finite_where_the_router_is_certain_or_a_row_is_padding():
  is_token = jnp.array([[True] * 50, [False] * 50])

  def total(experts, groups):
    found = routed(experts, groups, is_token=is_token).losses
    return sum(jnp.sum(found[name]) for name in LOSSES)

  gradients = jax.grad(total, (0, 1))(random_logits(8, 1e4), random_logits(4, 1e4, seed=1))
  assert all(np.isfinite(g).all() for g in gradients)


def test_noise_moves_choices_and_leaves_the_losses_of_the_probabilities():
  logits = random_logits(8, 0.1)
  noise = draw_noise(Logits(logits), jnp.float32(1.0), jax.random.key(5))
  quiet, noisy = routed(logits), routed(logits, noise=noise)
  assert (quiet.choices != noisy.choices).mean() > 0.5
  np.testing.assert_array_equal(noisy.choices, routed(logits + noise.experts).choices)
  np.testing.assert_array_equal(noisy.losses["router_entropy"], quiet.losses["router_entropy"])


def test_noise_of_experts_and_groups_is_independent_and_of_the_given_deviation():
  logits = Logits(jnp.zeros((4, 1000, 4)), jnp.zeros((4, 1000, 4)))
  noise = draw_noise(logits, jnp.float32(0.3), jax.random.key(0))
  for values in noise:
    np.testing.assert_allclose([values.mean(), values.std()], [0, 0.3], atol=0.01)
  assert abs(np.corrcoef(noise.experts.ravel(), noise.groups.ravel())[0, 1]) < 0.05


def test_noise_falls_linearly_to_nothing_and_stays_there():
  found = [float(noise_deviation(2.0, 10, jnp.int32(step))) for step in (0, 5, 10, 1000)]
  np.testing.assert_allclose(found, [2, 1, 0, 0], rtol=1e-6)
  assert float(noise_deviation(2.0, 0, jnp.int32(1000))) == 2


def test_the_bias_step_is_worth_nothing_and_its_gradient_adds_up_over_parts():
  load = jnp.array([[5.0, 1.0, 2.0], [1.0, 0.0, 2.0]])
  value, whole = jax.value_and_grad(bias_step)(jnp.ones(3), load.sum(0))
  parts = sum(jax.grad(bias_step)(jnp.ones(3), part) for part in load)
  assert float(value) == 0
  np.testing.assert_array_equal(parts, whole)
  np.testing.assert_array_equal(np.sign(whole), np.sign(load.sum(0) - load.sum(0).mean()))
  assert np.abs(2.0**24 * whole).max() < 1e-9
  assert np.abs(whole / 2.0**24).min() > np.finfo(np.float32).tiny


def test_the_loss_inside_a_group_leaves_the_choice_of_the_group_alone():
  def entropy(experts, groups):
    return routed(experts, groups).losses["router_entropy"].sum()

  of_experts, of_groups = jax.grad(entropy, (0, 1))(random_logits(8), jnp.zeros((2, 50, 4)))
  np.testing.assert_allclose(of_groups, 0, atol=1e-7)
  assert float(jnp.abs(of_experts).max()) > 1e-4


def test_steps_against_the_load_even_out_a_skewed_router():
  logits = random_logits(8, shape=(4, 250)) + jnp.linspace(-1, 1, 8)

  def step(bias, _):
    load = routed(logits, name="sigmoid", bias=bias).losses["load"]
    return bias - 0.005 * jnp.sign(jax.grad(bias_step)(bias, load)), load

  _, loads = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(8), None, 100))()
  busiest = loads.max(axis=1) / loads.mean(axis=1)
  assert busiest[0] > 1.8
  assert busiest[-1] < 1.1
