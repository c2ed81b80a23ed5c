"""The report of a plan as text."""

from typing import Any

from ultrathink_jax.plan import roofline


def format_report(report: dict[str, Any]) -> str:
  """Returns the report for a terminal or a Markdown file."""
  lines = [*_head(report), "", *_memory(report)]
  if "speed" in report:
    lines += ["", *_collectives(report), "", *_speed(report), "", "Exchange, by the compiled program:", ""]
    lines += [f"- {line}" for line in report["exchange"]]
  return "\n".join(lines)


def format_flags(report: dict[str, Any]) -> str:
  """Returns the flags that choose what the report is of."""
  axes = " ".join(f"--config.mesh.{axis}={size}" for axis, size in report["mesh"].items())
  return (
    f"{axes} --config.mesh.zero={report['zero']} --config.model.remat={report['remat']} "
    f"--config.train.accumulation_steps={report['accumulation_steps']}"
  )


def format_mesh(mesh: dict[str, int]) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def rows_as_table(rows: list[tuple[str, ...]]) -> list[str]:
  """Returns a Markdown table, aligned to be read as it is; the first row is the header."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
  return [line(rows[0]), line(tuple("-" * width for width in widths)), *map(line, rows[1:])]


def _head(report: dict[str, Any]) -> list[str]:
  virtual = (
    "virtual CPU devices; judged by its numbers, kernels and schedule are the CPU's" if report["is_virtual"] else ""
  )
  kernels = ", ".join(f"{letter} {name}" for letter, name in report["kernels"].items())
  slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
  return [
    f"Model:    {report['model']}",
    f"Devices:  {slices}{report['topology']}, {report['devices']} devices{'; ' if virtual else ''}{virtual}",
    f"Mesh:     {format_mesh(report['mesh'])}; zero {report['zero']}, remat {report['remat']}",
    f"Batch:    {report['batch_size']} x {report['sequence_length']:,} = {report['tokens_per_step']:,} tokens a step, "
    f"in {report['accumulation_steps']} micro-batches",
    f"Kernels:  {kernels or 'no choice'}",
    f"Compiled: in {report['compile_seconds']:.0f} s, jax {report['versions']['jax']}" + _effort(report),
    f"Flags:    {format_flags(report)}",
  ]


def _memory(report: dict[str, Any]) -> list[str]:
  have, estimate = report["chip_memory_bytes"], report["estimated_memory"]["total"]
  if "memory" not in report:
    return [
      f"Memory:   does not fit {gib(have)} a device: {report['refusal']}",
      f"          estimated before compiling: {gib(estimate)}",
    ]
  memory = report["memory"]
  rest = memory["arguments"] - memory["parameters"] - memory["frozen"] - memory["optimizer"]
  rows = [
    ("memory of one device", "GiB", "from"),
    ("parameters", _number(memory["parameters"]), "counted"),
    *([("frozen weights", _number(memory["frozen"]), "counted")] if memory["frozen"] else []),
    ("optimizer state", _number(memory["optimizer"]), "counted"),
    ("batch and other arguments", _number(rest), "compiled"),
    ("outputs beside donated state", _number(memory["outputs"] - memory["aliased"]), "compiled"),
    ("gradients, activations, gathered weights", _number(memory["temporaries"]), "compiled"),
    ("code", _number(memory["code"]), "compiled"),
    ("all", _number(memory["total"]), "compiled"),
    ("the chip's", _number(have), "published"),
    ("estimate without compiling", _number(estimate), "counted"),
  ]
  verdict = "fits" if report["fits"] else "DOES NOT FIT"
  return [*rows_as_table(rows), "", f"It {verdict}: {memory['total'] / have:.0%} of the chip's memory."]


def _collectives(report: dict[str, Any]) -> list[str]:
  rows = [("exchange of one device in a step", "axes", "times", "GiB received", "of it asynchronous")]
  for line in report["collectives"]:
    share = line["async_bytes"] / line["bytes"] if line["bytes"] else 0.0
    axes = " x ".join(line["axes"]) or "none"
    rows.append((line["kind"], axes, f"{line['count']:,}", _number(line["bytes"]), f"{share:.0%}"))
  return [*rows_as_table(rows), "", "All compiled: read from the program, loops multiplied by their turns."]


def _speed(report: dict[str, Any]) -> list[str]:
  speed = report["speed"]
  teraflops = lambda value: f"{value / 1e12:,.1f}"
  milliseconds = lambda value: f"{value * 1e3:,.1f}"
  rows = [
    ("speed of one device in a step", "value", "from"),
    ("TFLOP of the model, no recomputation", teraflops(speed["model_flops"]), "counted by formula"),
    ("TFLOP of all matrix products", teraflops(speed["counted_flops"]), "counted in the traced step"),
    ("TFLOP by the compiler, loop bodies once", teraflops(speed["compiler_flops"]), "compiled"),
    ("GiB through memory", _number(speed["memory_traffic_bytes"]), "compiled, at most"),
    ("ms of products", milliseconds(speed["compute_seconds"]), f"assumed {roofline.MATMUL_EFFICIENCY:.0%} of peak"),
    ("ms of memory", milliseconds(speed["memory_seconds"]), f"assumed {roofline.MEMORY_EFFICIENCY:.0%} of peak"),
  ]
  for axes, seconds in speed["exchange_seconds"].items():
    rows.append(
      (f"ms of exchange over {axes}", milliseconds(seconds), f"assumed {roofline.LINK_EFFICIENCY:.0%} of peak")
    )
  if speed["pipeline_bubble"]:
    rows.append(("pipeline bubble", f"{speed['pipeline_bubble']:.1%}", "counted by formula"))
  ends = [("", "if exchange is hidden", "if none is")]
  values = lambda key, form: tuple(form(speed[end][key]) for end in ("overlapped", "serial"))
  ends.append(("ms a step", *values("step_seconds", milliseconds)))
  ends.append(("tokens per second", *values("tokens_per_second", lambda value: f"{value:,.0f}")))
  ends.append(("MFU", *values("mfu", lambda value: f"{value:.1%}")))
  ends.append(("days for train.steps", *values("days", lambda value: f"{value:,.1f}")))
  if "dollars" in speed["serial"]:
    ends.append(("dollars for train.steps", *values("dollars", lambda value: f"{value:,.0f}")))
  return [*rows_as_table(rows), "", *rows_as_table(ends)]


def gib(size: float | int) -> str:
  return f"{_number(size)} GiB"


def _number(size: float | int) -> str:
  return f"{size / 2**30:,.2f}"


def _effort(report: dict[str, Any]) -> str:
  if report["compile_effort"] >= 0:
    return ", as a run is"
  return ", with the least effort: a run gathers more beside its work (JAX_EXEC_TIME_OPTIMIZATION_EFFORT=0 compiles so)"
