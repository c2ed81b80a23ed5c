"""The train step as a compiled program, from shapes alone: nothing is allocated. Letters: B batch  T length."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ultrathink_jax.config import Config
from ultrathink_jax.parallel.mesh import BATCH_AXES
from ultrathink_jax.train.checkpoint import shapes_on
from ultrathink_jax.train.plan import Plan, compile_step
from ultrathink_jax.types import Batch, Context, Recipe


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device. Donated arguments are where the outputs go, so they count once.

  `temporaries` hold gradients, activations and gathered parameters at the moment when they are most.
  """

  parameters: int
  frozen: int
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
class Program:
  """What the compiler made of a train step.

  Attributes:
    memory: None where the compiler refused because it does not fit, and so is `executable`.
    refusal: what it then said.
  """

  plan: Plan
  seconds: float
  memory: Memory | None
  refusal: str
  executable: Any


def batch_shapes(config: Config, plan: Plan) -> Batch:
  """Returns the shapes of a global batch and how it lies on the mesh."""
  shape = config.train.batch_size, config.train.sequence_length
  sharding = NamedSharding(plan.mesh, PartitionSpec(BATCH_AXES, "context"))
  of = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return Batch(of(jnp.int32), of(jnp.int32), of(jnp.float32), Context(of(jnp.int32), of(jnp.int32)))


def compile_program(config: Config, recipe: Recipe, plan: Plan) -> Program:
  """Returns the train step that `plan` would run."""
  state, frozen = shapes_on(plan.shapes, plan.shardings), shapes_on(plan.frozen, plan.frozen_shardings)
  begun = time.monotonic()
  try:
    with jax.set_mesh(plan.mesh):
      step = compile_step(config, recipe, plan, state, frozen, batch_shapes(config, plan))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Program(plan, time.monotonic() - begun, None, _reason(str(error)), None)
  return Program(plan, time.monotonic() - begun, _memory(plan, step), "", step)


def _reason(error: str) -> str:
  """Returns the line in which the compiler says how much it lacks."""
  found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+\. Exceeded [^.]*\.\d*\w*", error)
  return found[0] if found else error.splitlines()[0][:200]


def _memory(plan: Plan, step: Any) -> Memory:
  sizes = step.memory_analysis()
  on_device = lambda tree, shardings: sum(
    jax.tree.leaves(
      jax.tree.map(lambda x, s: jnp.dtype(x.dtype).itemsize * math.prod(s.shard_shape(x.shape)), tree, shardings)
    )
  )
  return Memory(
    on_device(plan.shapes.params, plan.shardings.params),
    on_device(plan.frozen, plan.frozen_shardings),
    on_device(plan.shapes.opt_state, plan.shardings.opt_state),
    sizes.argument_size_in_bytes,
    sizes.output_size_in_bytes,
    sizes.alias_size_in_bytes,
    sizes.temp_size_in_bytes,
    sizes.generated_code_size_in_bytes,
  )
