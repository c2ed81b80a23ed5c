"""The device mesh: which axes there are, and how many devices each has."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from ultrathink_jax.config import MeshConfig
from ultrathink_jax.errors import ConfigError

BATCH_AXES = ("data", "fsdp", "expert")  # axes that split the rows of a batch
_READY_AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh:
  """Returns the mesh over all devices.

  Raises:
    ConfigError: the axes do not multiply to the number of devices, or `batch_size` rows, the rows of one micro-batch,
      do not divide over the axes that split a batch.
  """
  sizes = dataclasses.asdict(config)
  num_devices = len(jax.devices())
  fixed = math.prod(size for size in sizes.values() if size != -1)
  for axis, size in sizes.items():
    if size == -1:
      sizes[axis] = max(1, num_devices // fixed)
  if math.prod(sizes.values()) != num_devices:
    spelled = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
    raise ConfigError(
      f"mesh {spelled} needs {math.prod(sizes.values())} devices and there are {num_devices}; "
      f"choose axes whose product divides {num_devices}, with one of them -1"
    )
  for axis, size in sizes.items():
    if size > 1 and axis not in _READY_AXES:
      raise ConfigError(f"mesh.{axis}={size}: only {', '.join(_READY_AXES)} can exceed 1 in this version; set it to 1")
  ways = math.prod(sizes[axis] for axis in BATCH_AXES)
  if batch_size % ways:
    raise ConfigError(
      f"{batch_size} sequences (train.batch_size / train.accumulation_steps) do not divide over {ways} devices "
      f"({' x '.join(BATCH_AXES)}); choose a multiple of {ways}"
    )
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
