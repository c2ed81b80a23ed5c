"""Mode plan: one report of a config on a topology, or a search for the best way to run it there."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ultrathink_jax.config import Config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.plan import search, table
from ultrathink_jax.plan.compiled import compile_train_step
from ultrathink_jax.plan.report import make_report
from ultrathink_jax.plan.topology import Topology, make_devices, parse, prepare

_SHOWN = 12  # estimates


class Request(NamedTuple):
  """What to plan: `price` is dollars per device and hour; `compiles` is how many candidates of a search to compile."""

  topology: str
  price: float | None
  is_search: bool
  compiles: int


def make_plan(config: Config, request: Request, log: Callable[[str], None]) -> tuple[dict[str, Any], str]:
  """Returns the contents of plan.json and the text for people. Raises ConfigError where there can be no plan."""
  if request.is_search and config.is_adapted:
    raise ConfigError("--search plans full training alone; give a mesh for a run with lora.rank or train.trainable")
  topology = parse(request.topology, config.mesh.slices)
  prepare(topology)
  devices = make_devices(topology)
  if request.is_search:
    return _search(config, request, topology, devices, log)
  report = make_report(config, topology, compile_train_step(config, topology, devices), request.price)
  return report, table.format_report(report)


def _search(
  config: Config, request: Request, topology: Topology, devices: list[Any], log: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
  found = search.candidates(config, topology, devices)
  if not found:
    raise ConfigError(
      f"no mesh of {topology.num_devices} devices divides this model and train.batch_size={config.train.batch_size}; "
      f"choose a batch size with more divisors"
    )
  fitting = [each for each in found if each.is_fit]
  log(f"[plan] {len(found):,} ways to run, {len(fitting):,} fit by the estimate; compiling {request.compiles}")
  reports = []
  for each in search.best_distinct(fitting or found, request.compiles):
    compiled = compile_train_step(each.config, topology, devices)
    report = make_report(each.config, topology, compiled, request.price)
    report["estimate"] = {"memory_bytes": each.memory_bytes, "step_seconds": each.seconds}
    reports.append(report)
    log(f"[plan] {table.format_mesh(report['mesh'])}, {_verdict(report)}, compiled in {compiled.seconds:.0f} s")
  reports.sort(key=lambda report: (not report["fits"], -_speed(report)))
  best = reports[0]
  text = [
    f"{len(found):,} ways to run were estimated and {len(reports)} compiled. By tokens/s if no exchange is hidden:",
    "",
    *table.rows_as_table([_HEADER, *map(_compiled_row, reports)]),
    "",
    "Best estimates:",
    "",
    *table.rows_as_table([_ESTIMATE_HEADER, *map(_estimated_row, (fitting or found)[:_SHOWN])]),
    "",
    "The first of the compiled ones:" if best["fits"] else "None of the compiled ones fits; the first of them:",
    "",
    table.format_report(best),
  ]
  return best | {"search": {"candidates": len(found), "fitting": len(fitting), "compiled": reports}}, "\n".join(text)


def _speed(report: dict[str, Any]) -> float:
  return report["speed"]["serial"]["tokens_per_second"] if "speed" in report else 0.0


def _verdict(report: dict[str, Any]) -> str:
  if "memory" not in report:
    return report["refusal"]
  return f"{table.gib(report['memory']['total'])} a device, {_speed(report):,.0f} tokens/s"


_HEADER = ("mesh", "remat", "micro-batches", "GiB compiled", "GiB estimated", "tokens/s", "fits")
_ESTIMATE_HEADER = ("mesh", "remat", "micro-batches", "GiB", "ms a step")


def _compiled_row(report: dict[str, Any]) -> tuple[str, ...]:
  memory = f"{report['memory']['total'] / 2**30:.1f}" if "memory" in report else "too much"
  return (
    table.format_mesh(report["mesh"]),
    report["remat"],
    str(report["accumulation_steps"]),
    memory,
    f"{report['estimate']['memory_bytes'] / 2**30:.1f}",
    f"{_speed(report):,.0f}",
    "yes" if report["fits"] else "no",
  )


def _estimated_row(each: search.Candidate) -> tuple[str, ...]:
  return (
    table.format_mesh(each.config.mesh.axes),
    each.config.model.remat,
    str(each.config.train.accumulation_steps),
    f"{each.memory_bytes / 2**30:.1f}",
    f"{each.seconds * 1e3:,.0f}",
  )
