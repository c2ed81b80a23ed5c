"""The train step, compiled for devices that are not here."""

import dataclasses
import sys
from typing import Any

import jax

from ultrathink_jax.config import Config
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.plan.flops import count_flops
from ultrathink_jax.plan.topology import Topology
from ultrathink_jax.platform import compiling_for
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.train.checkpoint import shapes_on
from ultrathink_jax.train.plan import Plan, make_plan, step_function
from ultrathink_jax.train.program import Memory, batch_shapes, compile_program
from ultrathink_jax.types import Recipe


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a train step.

  Attributes:
    memory: None where the compiler refused because it does not fit.
    refusal: what it then said.
    flops: of one device by the compiler's count, in which the body of a loop counts once.
    hlo: the optimized program.
  """

  plan: Plan
  seconds: float
  memory: Memory | None
  refusal: str
  flops: float
  hlo: str


def lay_out(config: Config, topology: Topology, devices: list[Any]) -> tuple[Recipe, Plan]:
  """Returns the plan that training would make on `devices`, whatever it needs. Raises ConfigError if there is none."""
  recipe = find_recipe(config)
  endless = Devices(topology.chip.platform, topology.kind, len(devices), sys.maxsize)
  with compiling_for(target(topology)):
    return recipe, make_plan(config, recipe, endless, devices)


def target(topology: Topology) -> str:
  """Returns the platform that kernels are chosen for; virtual devices are CPUs."""
  return "cpu" if topology.is_virtual else topology.chip.platform


def for_target(config: Config, topology: Topology) -> Config:
  """Returns the config as it is compiled: virtual GPUs scan over periods as GPUs do, and as CPUs would not."""
  if topology.chip.platform == "gpu" and not config.model.unroll:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, unroll=1))
  return config


def compile_train_step(config: Config, topology: Topology, devices: list[Any]) -> Compiled:
  """Returns the train step of `config` as compiled for `devices`; nothing is allocated."""
  config = for_target(config, topology)
  recipe, plan = lay_out(config, topology, devices)
  with compiling_for(target(topology)):
    program = compile_program(config, recipe, plan)
  step = program.executable
  flops, hlo = (0.0, "") if step is None else (_flops(step), step.as_text())
  return Compiled(plan, program.seconds, program.memory, program.refusal, flops, hlo)


def count_step_flops(config: Config, topology: Topology, plan: Plan) -> int:
  """Returns the FLOPs of the traced train step's matrix products over all devices, recomputation included."""
  config = for_target(config, topology)
  recipe = find_recipe(config)
  state, frozen = shapes_on(plan.shapes, plan.shardings), shapes_on(plan.frozen, plan.frozen_shardings)
  with compiling_for(target(topology)), jax.set_mesh(plan.mesh):
    step = step_function(config, recipe, plan)
    return count_flops(jax.make_jaxpr(step)(state, frozen, batch_shapes(config, plan)))


def _flops(step: Any) -> float:
  analysis = step.cost_analysis() or {}
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  return float(analysis.get("flops", 0.0))
