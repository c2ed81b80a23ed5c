"""What the trials of a sweep came to, best first: sweep.json, sweep.md and a table on the console."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.config import EvaluateConfig
from ultrathink_jax.sweep.trials import Request, Trial
from ultrathink_jax.train.metrics import format_duration
from ultrathink_jax.workdir import read_json, write_json

_OF_RESULT = ("loss", "perplexity", "bits_per_byte")  # of the whole validation split, in run.json


class Outcome(NamedTuple):
  """What a trial came to.

  Attributes:
    state: waiting, running, finished, failed or stopped.
    exit_code: of its last session.
    line: what it said as it failed.
    value: of the metric, where it has finished.
    seconds: that its sessions of this sweep took.
  """

  state: str = "waiting"
  exit_code: int | None = None
  line: str = ""
  value: int | float | None = None
  seconds: float = 0.0


def read_value(directory: Path, config: EvaluateConfig) -> int | float | None:
  """Returns what the metric of evaluate.best_metric came to in a finished trial, None where it does not report it.

  Metrics of the last evaluation are of the whole validation split; of others the best logged value counts.
  """
  section, _, name = config.best_metric.partition("/")
  result = read_json(directory / "run.json").get("result", {})
  if section == "evaluate" and name in _OF_RESULT and name in result:
    return result[name]
  values = [
    row[config.best_metric]
    for file in ("evaluations.jsonl", "metrics.jsonl")
    for row in _rows(directory / file)
    if isinstance(row.get(config.best_metric), (int, float))
  ]
  best = min if config.best_is == "lowest" else max
  return best(values, default=None)


def _rows(path: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ranked(trials: Sequence[Trial], outcomes: Sequence[Outcome], config: EvaluateConfig) -> list[tuple[Trial, Outcome]]:
  """Returns trials with their outcomes: those with a value first, the best of them at the top."""
  sign = 1 if config.best_is == "lowest" else -1

  def order(pair: tuple[Trial, Outcome]) -> tuple[bool, float]:
    value = pair[1].value
    has_none = value is None or not math.isfinite(value)
    return has_none, 0.0 if has_none else sign * value

  return sorted(zip(trials, outcomes, strict=True), key=order)


def write(
  workdir: Path, request: Request, config: EvaluateConfig, trials: Sequence[Trial], outcomes: Sequence[Outcome]
) -> None:
  """Writes sweep.json and sweep.md, each as a whole."""
  pairs = ranked(trials, outcomes, config)
  values = {
    "axes": list(request.axes),
    "num_random": request.num_random,
    "seed": request.seed,
    "metric": config.best_metric,
    "best_is": config.best_is,
    "trials": [{"name": trial.name, "values": trial.values, **outcome._asdict()} for trial, outcome in pairs],
  }
  write_json(workdir / "sweep.json", values)
  header, *rows = _table(pairs, config)
  lines = [f"# {workdir.resolve().name}: {config.best_metric}, {config.best_is} first", ""]
  lines += [_markdown(header), _markdown(["---"] * len(header)), *map(_markdown, rows)]
  temporary = workdir / "sweep.md.tmp"
  temporary.write_text("\n".join(lines) + "\n")
  os.replace(temporary, workdir / "sweep.md")


def format_leaderboard(trials: Sequence[Trial], outcomes: Sequence[Outcome], config: EvaluateConfig) -> str:
  """Returns the table for the console."""
  table = _table(ranked(trials, outcomes, config), config)
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def _table(pairs: Sequence[tuple[Trial, Outcome]], config: EvaluateConfig) -> list[list[str]]:
  keys = list(pairs[0][0].values)
  rows = [["", *keys, config.best_metric, "state", "time"]]
  for place, (trial, outcome) in enumerate(pairs, 1):
    value = "" if outcome.value is None else f"{outcome.value:.5g}"
    state = f"exit {outcome.exit_code}: {outcome.line}" if outcome.state == "failed" else outcome.state
    time = format_duration(outcome.seconds) if outcome.seconds else ""
    rows.append([str(place) if value else "", *(trial.values[key] for key in keys), value, state, time])
  return rows


def _markdown(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
