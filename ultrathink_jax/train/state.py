"""The train state: its shapes, its layout over the mesh, and its first value."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ultrathink_jax.config import Config
from ultrathink_jax.parallel.sharding import optimizer_shardings, tree_shardings
from ultrathink_jax.types import Recipe, TrainState


def make_init(recipe: Recipe, optimizer: optax.GradientTransformation, seed: int):
  """Returns () -> (first TrainState, frozen)."""

  def init() -> tuple[TrainState, Any]:
    params, frozen = recipe.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), frozen

  return init


def state_shardings(
  config: Config, mesh: Mesh, recipe: Recipe, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState:
  """Returns the layout of `state` (arrays or shapes): parameters over fsdp by mesh.zero, moments always."""
  params = tree_shardings(mesh, recipe.axes, is_over_fsdp=config.mesh.zero == 3)
  opt_state = optimizer_shardings(mesh, optimizer, state.opt_state, tree_shardings(mesh, recipe.axes))
  if config.optimizer.offload:
    opt_state = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), opt_state)
  return TrainState(NamedSharding(mesh, PartitionSpec()), params, opt_state)


def to_device(shardings: Any) -> Callable[[Any], Any]:
  """Returns what moves a tree laid out by `shardings` into the memory of the devices."""
  moved = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings)
  return lambda tree: jax.device_put(tree, moved)
