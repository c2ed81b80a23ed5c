"""Devices that need not exist: a named TPU topology, or virtual ones that stand for GPUs or CPUs."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.chips import CHIPS, Chip

_EFFORT = -1.0
_DIMS = re.compile(r"(\w+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class Topology:
  """What a plan is made for. Virtual devices are CPU devices of this process, which compile but do not run."""

  name: str
  kind: str
  shape: tuple[int, ...]  # of one slice: its torus, or the number of devices
  slices: int

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def num_devices(self) -> int:
    return int(np.prod(self.shape)) * self.slices

  @property
  def is_virtual(self) -> bool:
    return self.chip.platform != "tpu"

  def node_of(self, device: Any) -> int:
    """Returns the number of the slice or node that a device is in."""
    return device.id // self.chip.node_size if self.is_virtual else getattr(device, "slice_index", None) or 0


def parse(name: str, slices: int) -> Topology:
  """Returns the topology of `name`, as v5p:4x4x4, h200:8 or cpu:8, `slices` times. Raises ConfigError."""
  match = _DIMS.fullmatch(name)
  if match is None or match[1] not in CHIPS:
    raise ConfigError(
      f"--topology={name} is not KIND:SHAPE with KIND in {', '.join(CHIPS)}; write for example v5p:4x4x4 or h200:8"
    )
  kind, shape = match[1], tuple(int(size) for size in match[2].split("x"))
  dims = CHIPS[kind].torus_dims or 1
  if len(shape) != dims or 0 in shape:
    example = "x".join(["4"] * dims) if dims > 1 else "8"
    raise ConfigError(
      f"--topology={name} has {len(shape)} dims and {kind} has {dims}; write for example {kind}:{example}"
    )
  # A pod of GPUs is written as all of its devices.
  return Topology(name, kind, shape, slices if CHIPS[kind].torus_dims else 1)


def prepare(topology: Topology) -> None:
  """Sets JAX up to plan for `topology`, before it looks for devices: no accelerator of this machine is touched."""
  jax.config.update("jax_platforms", "cpu")
  if topology.is_virtual:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
      jax.config.update("jax_num_cpu_devices", topology.num_devices)
    return
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"--topology={topology.name} needs the TPU compiler and libtpu is not installed; "
      "run pip install 'ultrathink-jax[plan]', or plan on virtual devices with --topology=h200:8"
    )
  # Machine code takes most of a compilation and says little about memory or what is exchanged: at the least effort it
  # takes a sixth of the time. But no gather is asynchronous then, and temporaries differ by some tenths.
  if "JAX_EXEC_TIME_OPTIMIZATION_EFFORT" not in os.environ:
    jax.config.update("jax_exec_time_optimization_effort", _EFFORT)
  # The library asks the cloud what machine this is, complains where there is no answer, and would let one process at a
  # time have chips that are not here.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.kind}-8")


def make_devices(topology: Topology) -> list[Any]:
  """Returns the devices, for which programs can be compiled. Raises ConfigError."""
  if topology.is_virtual:
    devices = jax.devices("cpu")
    if len(devices) < topology.num_devices:
      raise ConfigError(
        f"--topology={topology.name} needs {topology.num_devices} virtual devices and XLA_FLAGS sets {len(devices)}; "
        "leave xla_force_host_platform_device_count away"
      )
    return devices[: topology.num_devices]
  several = {"num_slices": topology.slices} if topology.slices > 1 else {}
  try:
    return list(topologies.get_topology_desc(topology.name, "tpu", **several).devices)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise ConfigError(f"--topology={topology.name} is not one that the TPU compiler knows: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Link:
  """How devices along a mesh axis reach each other.

  Attributes:
    name: "ici", "nvlink" or "network".
    bandwidth: bytes per second into one device, from all neighbours on the axis at once.
    hops: mean way of a row in an exchange of all with all, in units of what a ring of 4 has; 1 for a switch.
  """

  name: str
  bandwidth: float
  hops: float = 1.0


def axis_links(topology: Topology, mesh: Mesh) -> dict[str, Link]:
  """Returns the link of each mesh axis of more than one device, from where its devices lie."""
  links = {}
  for number, axis in enumerate(mesh.axis_names):
    if mesh.shape[axis] > 1:
      line = np.moveaxis(mesh.devices, number, 0).reshape(mesh.shape[axis], -1)[:, 0]
      links[axis] = link_along(topology, list(line))
  return links


def link_along(topology: Topology, line: list[Any]) -> Link:
  """Returns how devices that follow one another on a mesh axis reach each other."""
  chip = topology.chip
  if len({topology.node_of(device) for device in line}) > 1:
    return Link("network", chip.network_bandwidth)
  if topology.is_virtual:
    return Link("nvlink" if chip.platform == "gpu" else "memory", chip.link_bandwidth)
  coords = np.array([device.coords for device in line])
  sizes = [len(set(column)) for column in coords.T]
  # Whole dims that wrap are rings, with a neighbour on either side; the rest are lines.
  ways = [2 if size == whole >= chip.wrap_size else 1 for size, whole in zip(sizes, topology.shape, strict=False)]
  bandwidth = chip.link_bandwidth * sum(way for way, size in zip(ways, sizes, strict=False) if size > 1)
  return Link("ici", bandwidth, max(1.0, max(sizes) / 4))
