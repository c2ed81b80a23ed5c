"""A plan as numbers for plan.json and as a table for people. Each number is compiled, counted or assumed."""

import dataclasses
from typing import Any

import jax

from ultrathink_jax import __version__
from ultrathink_jax.config import Config
from ultrathink_jax.kernels import backends
from ultrathink_jax.lora.coverage import flops_per_token
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.models.stack import bubble_of
from ultrathink_jax.plan import collectives, roofline
from ultrathink_jax.plan.collectives import Collective
from ultrathink_jax.plan.compiled import Compiled, count_step_flops, target
from ultrathink_jax.plan.exchange import exchange_lines
from ultrathink_jax.plan.topology import Topology, axis_links
from ultrathink_jax.plan.traffic import memory_traffic
from ultrathink_jax.platform import compiling_for

_RESERVED = 0.03  # assumed share of a chip's memory that the runtime keeps


def make_report(config: Config, topology: Topology, compiled: Compiled, price: float | None) -> dict[str, Any]:
  """Returns the contents of plan.json; without a program, because it did not fit, only what led to it."""
  mesh, tokens = compiled.plan.mesh, config.train.batch_size * config.train.sequence_length
  with compiling_for(target(topology)):
    kernels = backends.describe(config.model)
  report: dict[str, Any] = {
    "model": config.model.layers,
    "topology": topology.name,
    "slices": topology.slices,
    "devices": topology.num_devices,
    "is_virtual": topology.is_virtual,
    "mesh": dict(mesh.shape),
    "zero": config.mesh.zero,
    "remat": config.model.remat,
    "accumulation_steps": config.train.accumulation_steps,
    "batch_size": config.train.batch_size,
    "sequence_length": config.train.sequence_length,
    "tokens_per_step": tokens,
    "kernels": kernels,
    "versions": {"ultrathink_jax": __version__, "jax": jax.__version__},
    "compile_seconds": compiled.seconds,
    "compile_effort": jax.config.jax_exec_time_optimization_effort,
    "estimated_memory": dataclasses.asdict(compiled.plan.need) | {"total": compiled.plan.need.total},
    "chip_memory_bytes": topology.chip.memory_bytes,
    "refusal": compiled.refusal,
  }
  if compiled.memory is None:
    return report | {"fits": False}
  program = collectives.parse(compiled.hlo)
  found = collectives.find_collectives(program, mesh)
  report["memory"] = dataclasses.asdict(compiled.memory) | {"total": compiled.memory.total}
  report["fits"] = compiled.memory.total <= topology.chip.memory_bytes * (1 - _RESERVED)
  report["collectives"] = _collective_table(found)
  report["exchange"] = exchange_lines(config, mesh, program, found)
  report["speed"] = _speed(config, topology, compiled, found, memory_traffic(program), price)
  return report


def _collective_table(found: list[Collective]) -> list[dict[str, Any]]:
  table = collectives.by_kind_and_axes(found)
  return [{"kind": kind, "axes": list(axes), **values} for (kind, axes), values in table.items()]


def _speed(
  config: Config, topology: Topology, compiled: Compiled, found: list[Collective], traffic: int, price: float | None
) -> dict[str, Any]:
  mesh, chip, train = compiled.plan.mesh, topology.chip, config.train
  counted = count_step_flops(config, topology, compiled.plan) / mesh.size
  tokens = train.batch_size * train.sequence_length
  model = flops_per_token(config, count_model(config.model)) * tokens / mesh.size
  links = axis_links(topology, mesh)
  bubble = bubble_of(config.model, train.micro_batch_size, mesh.shape)
  times = roofline.roofline(topology, links, counted, traffic, found, bubble)
  ends = {}
  for name in ("overlapped", "serial"):
    seconds = getattr(times, name)
    ends[name] = {
      "step_seconds": seconds,
      "tokens_per_second": tokens / seconds,
      "mfu": model / (seconds * chip.peak_flops),
      "days": roofline.days(train.steps, seconds),
    }
    if price is not None:
      ends[name]["dollars"] = roofline.dollars(train.steps, seconds, mesh.size, price)
  return {
    "model_flops": model,
    "counted_flops": counted,
    "compiler_flops": compiled.flops,
    "memory_traffic_bytes": traffic,
    "compute_seconds": times.compute,
    "memory_seconds": times.memory,
    "exchange_seconds": times.exchange,
    "pipeline_bubble": bubble,
    "links": {axis: dataclasses.asdict(link) for axis, link in links.items()},
    **ends,
  }
