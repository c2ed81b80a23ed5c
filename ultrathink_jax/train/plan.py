"""The plan of a run, made before anything is allocated, and its train step as a program."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from ultrathink_jax.config import Config
from ultrathink_jax.lora.adapting import optimizer_of
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.optimizers.schedules import make_schedule
from ultrathink_jax.parallel.devices import Devices, compiler_options
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.placement import replicated
from ultrathink_jax.train.checkpoint import shapes_on
from ultrathink_jax.train.preflight import MemoryNeed, require_fit
from ultrathink_jax.train.state import frozen_shardings, make_init, state_shardings, to_device
from ultrathink_jax.train.step import make_train_step
from ultrathink_jax.types import Batch, Recipe, TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run before anything is allocated: mesh, rules of motion, shapes and layout of its state and of what is frozen."""

  mesh: Mesh
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  shapes: TrainState
  shardings: TrainState
  frozen: Any
  frozen_shardings: Any
  need: MemoryNeed


def make_plan(
  config: Config, recipe: Recipe, devices: Devices, mesh_devices: Sequence[jax.Device] | None = None
) -> Plan:
  """Returns the plan of a run that is consistent and fits the devices, by default all. Raises ConfigError otherwise."""
  mesh = make_mesh(config, mesh_devices)
  schedule = make_schedule(config.optimizer, config.train.steps)
  optimizer = make_optimizer(optimizer_of(config), schedule)
  shapes, frozen = jax.eval_shape(make_init(config, recipe, optimizer))
  shardings = state_shardings(config, mesh, recipe, optimizer, shapes)
  of_frozen = frozen_shardings(config, mesh, recipe, frozen)
  need = require_fit(config, recipe, shapes, shardings, devices, shapes_on(frozen, of_frozen))
  return Plan(mesh, schedule, optimizer, shapes, shardings, frozen, of_frozen, need)


def step_function(config: Config, recipe: Recipe, plan: Plan) -> Callable:
  """Returns the train step of the run, not compiled yet."""
  on_device = [to_device(plan.shardings.opt_state)] if config.optimizer.offload else []
  return make_train_step(config, recipe, plan.optimizer, *on_device)


def compile_step(config: Config, recipe: Recipe, plan: Plan, state: TrainState, frozen: Any, batch: Batch) -> Callable:
  """Returns the compiled train step for arguments, or shapes, like these; the state is donated."""
  step = step_function(config, recipe, plan)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(plan.shardings, replicated(plan.mesh)))
  options = compiler_options(config.model.dtype, config.train.deterministic)
  return jitted.lower(state, frozen, batch).compile(compiler_options=options)
