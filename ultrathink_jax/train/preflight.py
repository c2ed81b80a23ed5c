"""Whether a run fits the devices, worked out from shapes before anything is allocated or compiled."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ultrathink_jax.config import Config, ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels.cross_entropy_chunked import chunk_length
from ultrathink_jax.models.language_model import LanguageModel, parameter_shapes
from ultrathink_jax.models.layer import groups
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.parallel.mesh import batch_ways
from ultrathink_jax.types import Batch, Context, Recipe, TrainState

USABLE = 0.95  # share of a device's free memory that a run may plan to use


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
  """Bytes on one device at the peak of a train step."""

  parameters: int
  frozen: int
  optimizer: int
  gradients: int
  activations: int

  @property
  def state(self) -> int:
    return self.parameters + self.frozen + self.optimizer + self.gradients

  @property
  def total(self) -> int:
    return self.state + self.activations


def memory_need(
  config: Config, recipe: Recipe, state: TrainState, shardings: TrainState, frozen: Any = None
) -> MemoryNeed:
  """Returns what a train step needs on each device, for the shapes `state` laid out by `shardings`.

  `frozen` are the shapes of what the recipe freezes, with their layout.

  Activations are the residuals that the traced backward pass keeps, what it recomputes inside the largest period (or
  layer, where the policy keeps the outputs of layers), and the logits of one chunk of the loss; a device has its share
  of the length and of the stages. Sharding over the tensor axis is not counted in their favour. What rests in host
  memory counts as nothing.
  """
  parameters = _bytes_on_device(state.params, shardings.params)
  moments = _bytes_on_device(state.opt_state, shardings.opt_state)
  gradients = moments // 2 if config.mesh.zero == 2 else parameters
  accumulation = config.train.accumulation_steps
  rows = max(1, config.train.micro_batch_size // batch_ways(shardings.step.mesh.shape))
  return MemoryNeed(
    parameters,
    _bytes_on_device(frozen, jax.tree.map(lambda leaf: leaf.sharding, frozen)),
    0 if config.optimizer.offload else moments,
    gradients * (2 if accumulation > 1 else 1),
    _activation_bytes(config, recipe, (state.params, frozen), rows, shardings.step.mesh.shape),
  )


def require_fit(
  config: Config, recipe: Recipe, state: TrainState, shardings: TrainState, devices: Devices, frozen: Any = None
) -> MemoryNeed:
  """Returns the need of a run that fits.

  Raises:
    ConfigError: it does not; the line tells need, have, and the change that would make it fit.
  """
  need = memory_need(config, recipe, state, shardings, frozen)
  have = int(devices.memory_bytes * USABLE)
  if need.total <= have:
    return need
  advice = _what_fits(config, recipe, (state.params, frozen), need, have, shardings)
  frozen_part = f"frozen {gib(need.frozen)}, " if need.frozen else ""
  raise ConfigError(
    f"a train step needs {gib(need.total)} per device (parameters {gib(need.parameters)}, {frozen_part}optimizer "
    f"{gib(need.optimizer)}, gradients {gib(need.gradients)}, activations {gib(need.activations)}) and "
    f"{devices.count} x {devices.kind} can give {gib(have)}; {advice}"
  )


def _what_fits(
  config: Config, recipe: Recipe, weights: tuple[Any, Any], need: MemoryNeed, have: int, shardings: TrainState
) -> str:
  """Returns the smallest change that makes the run fit: more accumulation, then remat, then devices."""
  axes = shardings.step.mesh.shape
  ways = batch_ways(axes)
  batch_size = config.train.batch_size
  recomputing = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
  for changed, flag in ((config, ""), (recomputing, " --config.model.remat=full")):
    one_row = _activation_bytes(changed, recipe, weights, 1, axes)
    rows = (have - need.frozen - need.optimizer - 3 * need.parameters) // one_row
    steps = [k for k in range(1, batch_size + 1) if batch_size % (k * ways) == 0]
    steps = [k for k in steps if batch_size // (k * ways) <= rows]
    if steps:
      return f"--config.train.accumulation_steps={steps[0]}{flag} would fit, at the same batch"
  largest = have / need.state * sum(leaf.size for leaf in jax.tree.leaves(weights))
  alone = f"this memory holds the train state of a model of about {_short(largest)} parameters"
  if one_row >= have:
    return f"{alone}, and one sequence of this one takes {gib(one_row)}: shorten train.sequence_length"
  num_devices = math.ceil((need.state + need.parameters) / (have - one_row))
  return (
    f"{alone}; this one takes {num_devices} such devices or more, with mesh.fsdp={num_devices} and one sequence each"
  )


def _activation_bytes(
  config: Config, recipe: Recipe, weights: tuple[Any, Any], rows: int, axes: Mapping[str, int]
) -> int:
  if config.model.remat == "offload":  # on the device remains what full keeps
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
  length = config.train.sequence_length
  shape = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  batch = Batch(shape, shape, jax.ShapeDtypeStruct((rows, length), jnp.float32), Context(shape, shape))
  step, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
  kept = _residual_bytes(lambda *inputs: recipe.loss(*inputs)[0], *weights, batch, step, key)
  kept //= axes["pipe"]
  if config.model.remat != "none":
    periods = [group.letters for group in groups(config.model)]
    # With the outputs of layers at hand, a layer is computed again when its turn comes.
    units = set("".join(periods)) if config.model.remat in ("named", "dots") else periods
    kept += max(_period_bytes(config.model, letters, batch) for letters in units)
  logits = 8 * rows * config.model.vocab_size * chunk_length(rows, length, config.model.vocab_size)
  return (kept + logits) // axes["context"]


def _period_bytes(model: ModelConfig, letters: str, batch: Batch) -> int:
  """Returns what the backward pass through one period keeps."""
  period = dataclasses.replace(model, layers=letters, remat="none")
  params = parameter_shapes(period)
  forward = lambda p, _, b: LanguageModel(period).apply({"params": p}, b.tokens, b.context).hidden
  return _residual_bytes(forward, params, None, batch)


def _residual_bytes(function: Any, params: Any, frozen: Any, *inputs: Any) -> int:
  """Returns the bytes of the residuals that the backward pass of `function` keeps beside the weights themselves."""
  residuals = jax.eval_shape(lambda p, *rest: jax.vjp(lambda q: function(q, *rest), p)[1], params, frozen, *inputs)
  kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
  return max(0, kept - sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, frozen))))


def _bytes_on_device(tree: Any, shardings: Any) -> int:
  bytes_of = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(jax.tree.leaves(jax.tree.map(bytes_of, tree, shardings)))


def gib(size: int | float) -> str:
  """Returns a size as 10.2 GiB, a small one in MiB."""
  return f"{size / 2**30:,.1f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"


def _short(count: int | float) -> str:
  return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
