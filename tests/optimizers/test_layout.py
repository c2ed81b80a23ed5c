import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.models.language_model import init_params, parameter_axes
from ultrathink_jax.optimizers.averaging import averaged
from ultrathink_jax.optimizers.optimizers import OPTIMIZERS, make_optimizer
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.sharding import optimizer_shardings, tree_shardings

MODEL = tiny_model(layers="(AE)x2")
MESHES = {"galore": {"fsdp": 2}}  # on a few cores, more virtual devices wait for each other in a conditional for ever


def optimizer_for(name):
  config = dataclasses.replace(tiny_config().optimizer, name=name, schedule="constant")
  average = 0.0 if name == "schedule_free" else 0.9
  config = dataclasses.replace(config, average_decay=average, galore=dataclasses.replace(config.galore, rank=6))
  return make_optimizer(config, optax.constant_schedule(0.01))


def two_updates(name, params, gradients, shardings=None):
  """Returns the parameters, their average, and the state, after two updates of a compiled optimizer."""
  optimizer = optimizer_for(name)
  state = jax.jit(optimizer.init, out_shardings=shardings)(params)

  def update(state, params):
    curvature = lambda: jax.tree.map(jnp.square, gradients)
    updates, state = optimizer.update(gradients, state, params, step=jnp.int32(0), curvature=curvature)
    return state, optax.apply_updates(params, updates)

  step = jax.jit(update, out_shardings=None if shardings is None else (shardings, jax.tree.map(_sharding, params)))
  for _ in range(2):
    state, params = step(state, params)
  return params, jax.jit(averaged)(state, params), state


def _sharding(leaf):
  return leaf.sharding


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name == "galore" else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_a_state_lies_over_the_mesh_like_the_parameters_and_moves_them_alike(name):
  params = jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()
  gradients = jax.tree.map(lambda x: 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  alone, average, _ = two_updates(name, params, gradients)
  axes = MESHES.get(name, {"fsdp": 4, "tensor": 2})
  number = math.prod(axes.values())
  mesh = make_mesh(tiny_config(mesh={"data": 1} | axes), jax.devices()[:number])
  lay = tree_shardings(mesh, parameter_axes(MODEL))
  with jax.set_mesh(mesh):
    spread, held = jax.device_put((params, gradients), (lay, lay))
    shapes = jax.eval_shape(optimizer_for(name).init, params)
    shardings = optimizer_shardings(mesh, optimizer_for(name), shapes, lay)
    together, spread_average, state = two_updates(name, spread, held, shardings)
  for ours, theirs in zip(jax.tree.leaves((together, spread_average)), jax.tree.leaves((alone, average)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)
  table = params["embedding"]["table"]
  like_table = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == table.shape]
  assert like_table
  for leaf in like_table:
    assert leaf.addressable_shards[0].data.size == table.size // number
