"""The train step, compiled for devices that are not here. Letters: B batch  T length."""

import dataclasses
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ultrathink_jax.config import Config
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.parallel.mesh import BATCH_AXES
from ultrathink_jax.plan.flops import count_flops
from ultrathink_jax.plan.topology import Topology
from ultrathink_jax.platform import compiling_for
from ultrathink_jax.recipes import RECIPES
from ultrathink_jax.train import loop
from ultrathink_jax.train.checkpoint import shapes_on
from ultrathink_jax.types import Batch, Context, Recipe


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device. Donated arguments are where the outputs go, so they count once.

  `temporaries` hold gradients, activations and gathered parameters at the moment when they are most.
  """

  parameters: int
  optimizer: int
  arguments: int
  outputs: int
  aliased: int  # of the outputs, in the place of arguments
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a train step.

  Attributes:
    memory: None where the compiler refused because it does not fit.
    refusal: what it then said.
    flops: of one device by the compiler's count, in which the body of a loop counts once.
    hlo: the optimized program.
  """

  plan: loop.Plan
  seconds: float
  memory: Memory | None
  refusal: str
  flops: float
  hlo: str


def lay_out(config: Config, topology: Topology, devices: list[Any]) -> tuple[Recipe, loop.Plan]:
  """Returns the plan that training would make on `devices`, whatever it needs. Raises ConfigError if there is none."""
  recipe = RECIPES[config.recipe](config)
  endless = Devices(topology.chip.platform, topology.kind, len(devices), sys.maxsize)
  with compiling_for(target(topology)):
    return recipe, loop.make_plan(config, recipe, endless, devices)


def target(topology: Topology) -> str:
  """Returns the platform that kernels are chosen for; virtual devices are CPUs."""
  return "cpu" if topology.is_virtual else topology.chip.platform


def for_target(config: Config, topology: Topology) -> Config:
  """Returns the config as it is compiled: virtual GPUs scan over periods as GPUs do, and as CPUs would not."""
  if topology.chip.platform == "gpu" and not config.model.unroll:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, unroll=1))
  return config


def batch_shapes(config: Config, plan: loop.Plan) -> Batch:
  """Returns the shapes of a global batch and how it lies on the mesh."""
  shape = config.train.batch_size, config.train.sequence_length
  sharding = NamedSharding(plan.mesh, PartitionSpec(BATCH_AXES, "context"))
  of = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return Batch(of(jnp.int32), of(jnp.int32), of(jnp.float32), Context(of(jnp.int32), of(jnp.int32)))


def compile_train_step(config: Config, topology: Topology, devices: list[Any]) -> Compiled:
  """Returns the train step of `config` as compiled for `devices`; nothing is allocated."""
  config = for_target(config, topology)
  recipe, plan = lay_out(config, topology, devices)
  state = shapes_on(plan.shapes, plan.shardings)
  frozen = jax.eval_shape(recipe.init, jax.random.key(0))[1]
  begun = time.monotonic()
  try:
    with compiling_for(target(topology)), jax.set_mesh(plan.mesh):
      step = loop.compile_step(config, recipe, plan, state, frozen, batch_shapes(config, plan))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Compiled(plan, time.monotonic() - begun, None, _reason(str(error)), 0.0, "")
  seconds = time.monotonic() - begun
  return Compiled(plan, seconds, _memory(plan, step), "", _flops(step), step.as_text())


def _reason(error: str) -> str:
  """Returns the line in which the compiler says how much it lacks."""
  found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+\. Exceeded [^.]*\.\d*\w*", error)
  return found[0] if found else error.splitlines()[0][:200]


def _memory(plan: loop.Plan, step: Any) -> Memory:
  sizes = step.memory_analysis()
  on_device = lambda tree, shardings: sum(
    jax.tree.leaves(
      jax.tree.map(lambda x, s: jnp.dtype(x.dtype).itemsize * math.prod(s.shard_shape(x.shape)), tree, shardings)
    )
  )
  return Memory(
    on_device(plan.shapes.params, plan.shardings.params),
    on_device(plan.shapes.opt_state, plan.shardings.opt_state),
    sizes.argument_size_in_bytes,
    sizes.output_size_in_bytes,
    sizes.alias_size_in_bytes,
    sizes.temp_size_in_bytes,
    sizes.generated_code_size_in_bytes,
  )


def count_step_flops(config: Config, topology: Topology, plan: loop.Plan) -> int:
  """Returns the FLOPs of the traced train step's matrix products over all devices, recomputation included."""
  config = for_target(config, topology)
  recipe = RECIPES[config.recipe](config)
  frozen = jax.eval_shape(recipe.init, jax.random.key(0))[1]
  state = shapes_on(plan.shapes, plan.shardings)
  with compiling_for(target(topology)), jax.set_mesh(plan.mesh):
    step = loop.step_function(config, recipe, plan)
    return count_flops(jax.make_jaxpr(step)(state, frozen, batch_shapes(config, plan)))


def _flops(step: Any) -> float:
  analysis = step.cost_analysis() or {}
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  return float(analysis.get("flops", 0.0))
