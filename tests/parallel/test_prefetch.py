"""Weights gathered a turn ahead: the same numbers as a plain scan, gathered where and kept as long as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.meshes import run
from tests.parallel.test_parity import relative_difference
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.prefetch import scan_gathering_ahead
from ultrathink_jax.plan.collectives import parse
from ultrathink_jax.plan.exchange import carried_gathers

R, D = 4, 3
MODEL = {"layers": "(MAE)x4", "gather_ahead": True, "remat": "full"}


def turn(weights, x, each, shared):
  x = jnp.tanh(x @ weights["kernel"]) * shared["scale"] + each
  return x, {"size": jnp.sum(x**2)}


def gather(weights):
  return jax.tree.map(lambda leaf: 2 * leaf, weights)


def total(scan):
  """Returns the gradient of a loss of all that a scan gives, in weights and x."""

  def loss(weights, x):
    turns = jnp.arange(len(weights["kernel"]), dtype=jnp.float32)
    x, ys = scan(weights, x, 0.1 * turns, {"scale": jnp.float32(0.7)})
    return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.cos(ys["size"]) * (1 + turns))

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def plain(weights, x, each, shared):
  return jax.lax.scan(lambda x, one: turn(gather(one[0]), x, one[1], shared), x, (weights, each))


@pytest.mark.parametrize("repeats", [2, R])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_values_and_gradients_equal_those_of_a_plain_scan(repeats, is_recomputed):
  weights = {"kernel": 0.3 * jax.random.normal(jax.random.key(0), (repeats, D, D))}
  x = jax.random.normal(jax.random.key(1), (2, D))
  one_turn = jax.checkpoint(turn, prevent_cse=False) if is_recomputed else turn

  def ahead(weights, x, each, shared):
    return scan_gathering_ahead(one_turn, gather, gather, lambda g: g, weights, x, each, shared)

  expected, found = total(plain)(weights, x), total(ahead)(weights, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_gathered_weights_are_not_kept_for_the_backward_pass():
  wide = 7  # gathering makes a row of D into one of `wide`, so that a kept array shows by its shape
  weights, x = jnp.ones((R, D)), jnp.ones(wide)
  widen, narrow = lambda w: jnp.tile(w, 3)[:wide], lambda g: g[:D]
  step = lambda w, x, each, shared: (jnp.sin(w * x), ())
  loss = lambda weights: scan_gathering_ahead(step, widen, narrow, lambda g: g, weights, x, jnp.zeros(R), ())[0].sum()
  program = jax.make_jaxpr(jax.grad(loss))(weights)
  scans = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
  assert len(scans) == 2
  kept = [out.aval.shape for out in scans[0].outvars]
  assert kept.count((R - 1, wide)) == 2  # x and cos(w x), no w


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "named"])
def test_a_mesh_that_gathers_ahead_trains_like_one_device(remat):
  model = MODEL | {"remat": remat}
  one, many = run({}, model, steps=5), run({"fsdp": 4, "tensor": 2}, model, steps=5)
  np.testing.assert_allclose(many.losses, one.losses, rtol=0, atol=1e-4)
  assert relative_difference(many.gradients, one.gradients) < 1e-5
  assert carried_gathers(parse(many.step.as_text()), 1 << 8)
  in_turn = run({"fsdp": 4, "tensor": 2}, model | {"gather_ahead": False}, steps=1)
  assert not carried_gathers(parse(in_turn.step.as_text()), 1 << 8)


@pytest.mark.parametrize(
  ("mesh", "model", "message"),
  [
    ({"pipe": 2, "fsdp": 2}, MODEL, r"gather_ahead=True with mesh\.pipe=2"),
    ({"fsdp": 2}, MODEL | {"remat": "none"}, r"gather_ahead=True with model\.remat='none'"),
  ],
)
def test_gathering_ahead_where_it_cannot_work_is_refused(mesh, model, message):
  with pytest.raises(ConfigError, match=message):
    run(mesh, model, steps=1)
