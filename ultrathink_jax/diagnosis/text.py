"""A diagnosis as text for people."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ultrathink_jax.train.preflight import gib

_LARGEST = 5  # gradients that are listed


def format_diagnosis(found: dict[str, Any]) -> str:
  """Returns the text of what `diagnose` found, its verdicts last."""
  parts = [_arithmetic(found["steps"]), _rates(found["learning_rates"]), _groups(found["parameters"])]
  parts.append(_memory(found["memory"]))
  if found["probe"]:
    parts += [_steps(found["probe"], found["tried_as"]), _gradients(found["probe"]["leaves"])]
  else:
    parts.append(["No step was made", *(f"  {line}" for line in found["tried_as"])])
  parts.append(_verdicts(found["findings"]))
  return "\n\n".join("\n".join(lines) for lines in parts)


def _arithmetic(steps: dict[str, Any]) -> list[str]:
  unknown = "unknown without the data"
  rows = {
    "tokens per step": f"{steps['tokens_per_step']:,} ({steps['batch_size']} x {steps['sequence_length']}, in "
    f"{steps['accumulation_steps']} micro-batches of {steps['micro_batch_size']})",
    "tokens in all": f"{steps['tokens']:,} in {steps['steps']:,} steps",
    "steps per epoch": f"{steps['steps_per_epoch']:,.1f}" if steps["steps_per_epoch"] else unknown,
    "epochs": f"{steps['epochs']:.2f}" if steps["epochs"] else unknown,
    "parameters": f"{steps['parameters']:,}, {steps['active_parameters']:,} active",
    "tokens per parameter": f"{steps['tokens_per_parameter']:.2g} (about 20 make the most of the compute)",
    "FLOPs per token": f"{steps['flops_per_token']:.3g}, {steps['flops_per_token'] * steps['tokens']:.3g} in all",
    "warm-up": f"{steps['warmup_steps']:,} steps, {steps['warmup_share']:.1%}",
    "evaluations, saves": f"{steps['evaluations']:,}, {steps['saves']:,}",
  }
  return ["Arithmetic", *_aligned(rows.items())]


def _rates(rates: list[dict[str, Any]]) -> list[str]:
  table = [("step", "rate"), *((f"{row['step']:,}", f"{row['learning_rate']:.3e}") for row in rates)]
  return ["Learning rate", *_aligned(table)]


def _groups(groups: dict[str, dict[str, int]]) -> list[str]:
  table = [("part", "decayed", "not decayed")]
  table += [(name, f"{each['decayed']:,}", f"{each['not_decayed']:,}") for name, each in groups.items()]
  sums = [sum(each[kind] for each in groups.values()) for kind in ("decayed", "not_decayed")]
  return ["Parameters and weight decay", *_aligned([*table, ("all", *(f"{total:,}" for total in sums))])]


def _memory(memory: dict[str, int]) -> list[str]:
  kinds = ("parameters", "optimizer", "gradients", "activations")
  rows = {**{kind: gib(memory[kind]) for kind in kinds}, "needed": gib(memory["need_bytes"])}
  return ["Memory of one device", *_aligned([*rows.items(), ("available", gib(memory["have_bytes"]))])]


def _steps(probe: dict[str, Any], tried_as: list[str]) -> list[str]:
  rows = {
    "shape": f"{probe['batch_size']} x {probe['sequence_length']} tokens, drawn uniformly",
    "loss": _series(probe["losses"], ".4f"),
    "gradient norm": _series(probe["grad_norms"], ".3g"),
    "compilation": f"{probe['compile_seconds']:.1f} s",
    "a step": f"{probe['step_seconds'] * 1e3:,.1f} ms, {probe['tokens_per_second']:,.0f} tokens/s",
  }
  return ["Steps on synthetic tokens", *(f"  {line}" for line in tried_as), *_aligned(rows.items())]


def _gradients(leaves: list[dict[str, Any]]) -> list[str]:
  squares: dict[str, float] = defaultdict(float)
  for leaf in leaves:
    squares[leaf["component"]] += _number(leaf["norm"]) ** 2
  rows = [(name, f"{math.sqrt(square):.3g}") for name, square in squares.items()]
  largest = sorted(leaves, key=lambda leaf: -_number(leaf["norm"]))[:_LARGEST]
  rows += [(f"largest: {leaf['name']}", f"{_number(leaf['norm']):.3g}") for leaf in largest]
  return ["Gradient norms of the first step", *_aligned(rows)]


def _verdicts(findings: list[dict[str, Any]]) -> list[str]:
  lines = ["Verdicts"]
  for each in findings:
    lines.append(f"  {'ok     ' if each['is_ok'] else 'look at'}  {each['name']}: {each['found']}")
    if not each["is_ok"]:
      lines.append(f"           try {each['advice']}")
  number = sum(not each["is_ok"] for each in findings)
  return [*lines, f"  {number or 'nothing'} to look at"]


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
  """Returns rows of cells as lines, the first column to the left, the last one as it is, others to the right."""
  rows = list(rows)
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  line = lambda row: "  ".join(
    [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
  )
  if len(rows[0]) == 2:
    line = lambda row: f"{row[0].ljust(widths[0])}  {row[1]}"
  return [f"  {line(row)}" for row in rows]


def _series(values: list[float | None], spelling: str) -> str:
  return " ".join(format(_number(value), spelling) for value in values)


def _number(value: float | None) -> float:
  return math.nan if value is None else value  # what was not finite
