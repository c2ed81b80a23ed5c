"""The device mesh: which axes there are, how many devices each has, and what a model must divide by to lie on it."""

import contextlib
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from ultrathink_jax import patterns
from ultrathink_jax.config import Config, MeshConfig
from ultrathink_jax.errors import ConfigError

BATCH_AXES = ("data", "fsdp", "expert")  # axes that split the rows of a batch


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh over `devices`, by default all there are, for a run that divides over it.

  Slices, if there are several, are the outer part of the data axis.

  Raises:
    ConfigError: the axes do not multiply to the number of devices, or the batch, the sequence or a dim of the model
      does not divide over its axis; the line names numbers that do.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(config.mesh, len(devices))
  check_division(config, sizes | {"data": sizes["data"] * config.mesh.slices})
  if config.mesh.slices == 1:
    # An axis may be a part of a dim of a TPU's torus, as 8 is on 4 x 4 x 4.
    laid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
  else:
    laid = _across_slices(sizes, config.mesh.slices, devices)
  return Mesh(laid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Returns the devices along each axis of one slice, with -1 replaced. Raises ConfigError."""
  sizes = dict(config.axes)
  each, rest = divmod(num_devices, config.slices)
  if rest:
    raise ConfigError(f"mesh.slices={config.slices} does not divide {num_devices} devices")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  for axis, size in sizes.items():
    if size == -1:
      sizes[axis] = max(1, each // fixed)
  if math.prod(sizes.values()) != each:
    spelled = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
    where = f"there are {each}" if config.slices == 1 else f"a slice has {each}"
    raise ConfigError(
      f"mesh {spelled} needs {math.prod(sizes.values())} devices and {where}; "
      f"choose axes whose product divides {each}, with one of them -1"
    )
  return sizes


def divides(config: Config, sizes: dict[str, int]) -> bool:
  """Returns whether `check_division` finds nothing."""
  try:
    check_division(config, sizes)
  except ConfigError:
    return False
  return True


def check_division(config: Config, sizes: dict[str, int]) -> None:
  """Raises ConfigError where something that an axis splits is no multiple of its size."""
  model = config.model
  for axis, what, number in _split_numbers(config):
    if number % sizes[axis]:
      raise ConfigError(
        f"mesh.{axis}={sizes[axis]} does not divide {what}={number}; the nearest that does is "
        f"mesh.{axis}={_nearest_divisor(number, sizes[axis])}"
      )
  tensor, mamba_groups = sizes["tensor"], model.mamba_num_groups
  if "M" in model.layers and tensor % mamba_groups and mamba_groups % tensor:
    raise ConfigError(
      f"mesh.tensor={tensor} neither divides model.mamba_num_groups={mamba_groups} nor is a multiple of it; "
      f"the nearest that does is mesh.tensor={_nearest_divisor(mamba_groups, tensor)}"
    )
  shard_tokens = config.train.sequence_length // sizes["context"]
  if "M" in model.layers and shard_tokens < model.mamba_conv_width - 1:
    raise ConfigError(
      f"mesh.context={sizes['context']} leaves {shard_tokens} tokens of a sequence on a device and "
      f"model.mamba_conv_width={model.mamba_conv_width} reads {model.mamba_conv_width - 1} before each; "
      f"choose a longer train.sequence_length or a smaller mesh.context"
    )
  rows = config.train.micro_batch_size
  ways = batch_ways(sizes)
  if rows % ways:
    raise ConfigError(
      f"{rows} sequences (train.batch_size / train.accumulation_steps) do not divide over {ways} devices "
      f"({' x '.join(BATCH_AXES)}); choose a multiple of {ways}"
    )
  parts = model.pipe_micro_batches or 1
  if sizes["pipe"] > 1 and rows // ways % parts:
    raise ConfigError(
      f"model.pipe_micro_batches={parts} does not divide the {rows // ways} sequences of a device; "
      f"choose {_nearest_divisor(rows // ways, parts)}"
    )


def _split_numbers(config: Config) -> list[tuple[str, str, int]]:
  """Returns (axis, name, number) of everything that a mesh axis of more than one device splits evenly."""
  model, letters = config.model, set(config.model.layers)
  numbers = [("fsdp", "model.embed_dim", model.embed_dim), ("tensor", "model.vocab_size", model.vocab_size)]
  if letters & set("AL"):
    numbers += [("tensor", "model.num_heads", model.num_heads), ("tensor", "model.num_kv_heads", model.num_kv_heads)]
    # Each device takes an early and a late part of the sequence, so that all have the same share of the causal mask.
    numbers += [("context", "train.sequence_length / 2", config.train.sequence_length // 2)]
  numbers += [("context", "train.sequence_length", config.train.sequence_length)]
  for group in patterns.parse(model.layers, string.ascii_uppercase):
    numbers += [("pipe", f"the periods of ({group.letters})x{group.repeats} in model.layers", group.repeats)]
  if "M" in letters:
    numbers += [("tensor", "the number of Mamba heads", model.mamba_heads)]
  if "F" in letters:
    numbers += [("tensor", "model.mlp_dim", model.mlp_dim)]
  if "E" in letters:
    numbers += [("expert", "model.num_experts", model.num_experts), ("tensor", "model.expert_dim", model.expert_dim)]
    if model.shared_expert_dim:
      numbers += [("tensor", "model.shared_expert_dim", model.shared_expert_dim)]
  return numbers


def _nearest_divisor(number: int, wanted: int) -> int:
  divisors = [k for k in range(1, number + 1) if number % k == 0]
  return min(divisors, key=lambda k: (abs(k - wanted), k))


def _across_slices(sizes: dict[str, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
  outer = [slices if axis == "data" else 1 for axis in sizes]
  if len({getattr(device, "slice_index", 0) for device in devices}) == slices:
    return mesh_utils.create_hybrid_device_mesh(tuple(sizes.values()), outer, devices)
  # Devices that do not tell their slice, as of several nodes of GPUs, come node by node.
  return np.asarray(devices).reshape(sizes["data"] * slices, *list(sizes.values())[1:])


def batch_ways(sizes: Mapping[str, int]) -> int:
  """Returns over how many devices the rows of a batch lie on a mesh of these axis sizes."""
  return math.prod(sizes[axis] for axis in BATCH_AXES)


def axis_size(axis: str) -> int:
  """Returns the devices along `axis` of the mesh set with jax.set_mesh; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def without_mesh() -> contextlib.AbstractContextManager[None]:
  """Makes what is traced inside ignore the mesh set with jax.set_mesh."""
  return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
