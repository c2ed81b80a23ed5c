"""The train state: its shapes, its layout over the mesh, and its first value."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ultrathink_jax.config import Config
from ultrathink_jax.parallel.sharding import fitted_shardings, optimizer_shardings
from ultrathink_jax.train import guard
from ultrathink_jax.types import Parameters, Recipe, TrainState


def make_init(
  config: Config, recipe: Recipe, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Any]]:
  """Returns (parameters of a base, or none) -> (first TrainState, frozen)."""

  def init(base: Parameters | None = None) -> tuple[TrainState, Any]:
    params, frozen = recipe.init(jax.random.key(config.train.seed), base)
    return begin(config, params, optimizer), frozen

  return init


def begin(config: Config, params: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step of a run that begins with `params`."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guard.begin(config.optimizer.guard))


def state_shardings(
  config: Config, mesh: Mesh, recipe: Recipe, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState:
  """Returns the layout of `state` (arrays or shapes): parameters over fsdp by mesh.zero, moments always."""
  params = fitted_shardings(mesh, recipe.axes, state.params, is_over_fsdp=config.mesh.zero == 3)
  moments = fitted_shardings(mesh, recipe.axes, state.params)
  opt_state = optimizer_shardings(mesh, optimizer, state.opt_state, moments)
  if config.optimizer.offload:
    opt_state = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), opt_state)
  everywhere = NamedSharding(mesh, PartitionSpec())
  return TrainState(everywhere, params, opt_state, jax.tree.map(lambda _: everywhere, state.guard))


def frozen_shardings(config: Config, mesh: Mesh, recipe: Recipe, frozen: Any) -> Any:
  """Returns the layout of what is frozen (arrays or shapes): as parameters, where the devices share it evenly."""
  if recipe.frozen_axes is None:
    return None
  return fitted_shardings(mesh, recipe.frozen_axes, frozen, is_over_fsdp=config.mesh.zero == 3)


def to_device(shardings: Any) -> Callable[[Any], Any]:
  """Returns what moves a tree laid out by `shardings` into the memory of the devices."""
  moved = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings)
  return lambda tree: jax.device_put(tree, moved)
