"""How long a step takes at the speed of the chip, its memory and its links, whichever is slowest."""

import dataclasses
import math

from ultrathink_jax.plan.collectives import Collective
from ultrathink_jax.plan.topology import Link, Topology

# Assumed shares of the published peaks that a long program reaches.
MATMUL_EFFICIENCY = 0.7
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of one device in a step; `overlapped` is the step if all exchange hides behind work, `serial` if none."""

  compute: float
  memory: float
  exchange: dict[str, float]  # by mesh axes, as "fsdp" or "fsdp x tensor"
  bubble: float  # share of the time that the stages of a pipeline wait

  @property
  def overlapped(self) -> float:
    return max(self.compute, self.memory, sum(self.exchange.values())) / (1 - self.bubble)

  @property
  def serial(self) -> float:
    return (max(self.compute, self.memory) + sum(self.exchange.values())) / (1 - self.bubble)


def roofline(
  topology: Topology,
  links: dict[str, Link],
  flops: float | int,
  memory_bytes: float | int,
  collectives: list[Collective],
  bubble: float,
) -> Roofline:
  """Returns the times for FLOPs, bytes and exchanges of one device."""
  chip = topology.chip
  exchange: dict[str, float] = {}
  for each in collectives:
    name = " x ".join(each.axes) or "other"
    exchange[name] = exchange.get(name, 0.0) + exchange_seconds(each, links)
  return Roofline(
    flops / (chip.peak_flops * MATMUL_EFFICIENCY),
    memory_bytes / (chip.memory_bandwidth * MEMORY_EFFICIENCY),
    exchange,
    bubble,
  )


def exchange_seconds(each: Collective, links: dict[str, Link]) -> float:
  """Returns the time of an exchange, bound by the slowest link among its axes or the sum of a torus's.

  Rings along several axes of a torus work side by side. Rows that all devices of a ring exchange with all pass through
  those between.
  """
  used = [links[axis] for axis in each.axes if axis in links] or list(links.values())
  if not used:
    return 0.0
  slow = [link for link in used if link.name == "network"]
  bandwidth = min(link.bandwidth for link in slow) if slow else sum(link.bandwidth for link in used)
  if not slow and used[0].name != "ici":
    bandwidth = max(link.bandwidth for link in used)
  hops = max(link.hops for link in used) if "all-to-all" in each.kind else 1.0
  if each.kind == "collective-permute":
    bandwidth = min(link.bandwidth for link in used)
  return each.moved_bytes * hops / (bandwidth * LINK_EFFICIENCY)


def days(steps: int, step_seconds: float) -> float:
  return steps * step_seconds / 86400


def dollars(steps: int, step_seconds: float, devices: int, price_per_device_hour: float) -> float:
  return math.prod((steps, step_seconds / 3600, devices, price_per_device_hour))
