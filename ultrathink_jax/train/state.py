"""The train state: its shapes, its layout over the mesh, and its first value."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ultrathink_jax.parallel.sharding import optimizer_shardings, tree_shardings
from ultrathink_jax.types import Recipe, TrainState


def make_init(recipe: Recipe, optimizer: optax.GradientTransformation, seed: int):
  """Returns () -> (first TrainState, frozen)."""

  def init() -> tuple[TrainState, Any]:
    params, frozen = recipe.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), frozen

  return init


def state_shardings(
  mesh: Mesh, recipe: Recipe, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState:
  """Returns the layout of `state` (arrays or shapes)."""
  params = tree_shardings(mesh, recipe.axes)
  opt_state = optimizer_shardings(mesh, optimizer, state.opt_state, params)
  return TrainState(NamedSharding(mesh, PartitionSpec()), params, opt_state)
