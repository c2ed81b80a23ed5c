"""What a run left in its directory, read for the report.

Letters: S logged steps, E experts.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Run(NamedTuple):
  """A run directory; every part may be empty.

  Attributes:
    name: of the run, or else of its directory.
    facts: the content of run.json.
    config: the content of config.json.
    metrics: the lines of metrics.jsonl.
    evaluations: the lines of evaluations.jsonl.
  """

  name: str
  facts: dict[str, Any]
  config: dict[str, Any]
  metrics: list[dict[str, Any]]
  evaluations: list[dict[str, Any]]

  def fact(self, *keys: str) -> Any:
    """Returns the value at the path `keys` of run.json, or None."""
    return _at(self.facts, keys)

  def setting(self, *keys: str) -> Any:
    """Returns the value at the path `keys` of config.json, or None."""
    return _at(self.config, keys)


def read(workdir: Path) -> Run:
  """Returns the run in `workdir`. Missing files are empty; a file or line that a kill tore counts as missing."""
  facts = _read_object(workdir / "run.json")
  return Run(
    name=facts.get("name") or workdir.resolve().name,
    facts=facts,
    config=_read_object(workdir / "config.json"),
    metrics=_read_lines(workdir / "metrics.jsonl"),
    evaluations=_read_lines(workdir / "evaluations.jsonl"),
  )


def series(rows: list[dict[str, Any]], key: str) -> tuple[Int[np.ndarray, "S"], Float[np.ndarray, "S"]]:
  """Returns (steps, values) of the rows that have `key`; null, a value that was not finite, is NaN."""
  rows = [row for row in rows if key in row]
  return np.array([row["step"] for row in rows], int), np.array([row[key] for row in rows], float)


def expert_loads(run: Run) -> tuple[Int[np.ndarray, "S"], dict[str, Float[np.ndarray, "S E"]]]:
  """Returns the steps and, for each layer of experts, every expert's share of the tokens."""
  rows = [row for row in run.metrics if row.get("moe/load")]
  layers = rows[-1]["moe/load"] if rows else {}
  rows = [row for row in rows if row["moe/load"].keys() == layers.keys()]
  loads = {layer: np.array([row["moe/load"][layer] for row in rows], float) for layer in layers}
  return np.array([row["step"] for row in rows], int), loads


def other_keys(run: Run, known: set[str]) -> list[str]:
  """Returns the scalar metrics outside `known`, in the order in which they first appear."""
  keys = {key: None for row in run.metrics for key, value in row.items() if isinstance(value, (int, float))}
  return [key for key in keys if key not in known]


def _at(values: Any, keys: tuple[str, ...]) -> Any:
  for key in keys:
    values = values.get(key) if isinstance(values, dict) else None
  return values


def _read_object(path: Path) -> dict[str, Any]:
  value = _parse(path.read_text("utf-8")) if path.exists() else None
  return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
  lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
  rows = [row for row in map(_parse, lines) if isinstance(row, dict) and "step" in row]
  return sorted(rows, key=lambda row: row["step"])


def _parse(text: str) -> Any:
  try:
    return json.loads(text)
  except ValueError:
    return None
