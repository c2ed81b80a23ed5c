"""What training data is like, as a page."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ultrathink_jax.config import Config
from ultrathink_jax.report import data_text
from ultrathink_jax.report.drawing import BLUE, MUTED, NARROW_PIXELS, ORANGE, Plot, render
from ultrathink_jax.report.page import Section, Tile, short
from ultrathink_jax.report.page import write as write_page

_MAX_RUN_CHARS = 6000
_MAX_TICKS = 9


def write(path: Path, facts: dict[str, Any], config: Config) -> Path:
  """Returns `path`, to which data.json is written as a page."""
  settings = json.loads(config.to_json())
  sections = [Section("Lengths", False, [_plot(facts, "documents"), _plot(facts, "tokens")])]
  values = {
    "name": facts["name"],
    "pattern": "",
    "progress": "what training reads",
    "compression": None,
    "tiles": _tiles(facts),
    "findings": [data_text.visible(finding) for finding in facts["findings"]],
    "tables": data_text.source_tables(facts),
    "sections": sections,
    "length_note": data_text.length_note(facts),
    "packings": data_text.packing_rows(facts),
    "samples": [_readable(sample) for sample in facts["samples"]],
    "fingerprint": facts["fingerprint"],
    "config": [(name, list(settings[name].items())) for name in ("data", "quality")],
  }
  return write_page(path, "data_page.html", values)


def _tiles(facts: dict[str, Any]) -> list[Tile]:
  train, validation, run = facts["splits"]["train"], facts["splits"]["validation"], facts["run"]
  positions = run["rows"] * run["sequence_length"]
  of_several = f"{run['passes']:.2f} of the source read most" if len(facts["sources"]) > 1 else "by this run"
  return [
    Tile("training tokens", short(train["tokens"]), f"{train['documents']:,} documents"),
    Tile("held out", short(validation["tokens"]), f"tokens in {validation['documents']:,} documents"),
    Tile("epochs", f"{run['epochs']:.2f}", of_several),
    Tile("the run", short(positions), f"positions in {run['steps']:,} steps"),
    Tile("filled", f"{facts['packings'][-1][run['packing']]['efficiency']:.1%}", f"packing {run['packing']}"),
  ]


def _plot(facts: dict[str, Any], what: str) -> Plot:
  """Returns the shares of the documents, or of all tokens, that documents of each range of lengths have."""
  rows, row_length = data_text.histogram_rows(facts), facts["run"]["sequence_length"]
  values = [row[1 if what == "documents" else 2] for row in rows]
  starts = [name.split("-")[0] for name, *_ in rows]
  first = facts["lengths"]["edges"].index(int(starts[0].replace(",", "")))
  edges = facts["lengths"]["edges"][first : first + len(rows) + 1]
  total = max(1, sum(values))

  def draw(figure: Figure) -> None:
    axes = figure.add_subplot()
    axes.bar(range(len(rows)), [value / total for value in values], 0.9, align="edge", color=BLUE)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel(f"of all {what}")
    shown = range(0, len(edges), -(-len(edges) // _MAX_TICKS))
    axes.set_xticks(shown, [f"{edges[at]:,}" for at in shown])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1.15 * max(values) / total or 1)
    axes.grid(visible=False, axis="x")
    _mark_row(axes, edges, row_length)

  svg = render(draw, NARROW_PIXELS, 250, f"lengths by {what}")
  return Plot(f"{what.capitalize()} by the length of the document", "", svg, svg)


def _mark_row(axes: Axes, edges: list[int], row_length: int) -> None:
  """Draws the length of a row, between the edges of bins that double."""
  for number, (low, high) in enumerate(pairwise(edges)):
    if low <= row_length < high:
      place = number + (row_length - low) / (high - low)
      axes.axvline(place, ymax=0.9, color=ORANGE, linewidth=1.2, linestyle=(0, (3, 2)))
      axes.annotate("a row", (place, 1), (4, -10), ("data", "axes fraction"), "offset points", color=MUTED)


def _readable(sample: dict[str, Any]) -> dict[str, Any]:
  """Returns a sample with texts that a page can show."""
  shown = lambda text: data_text.shorten(data_text.visible(text), _MAX_RUN_CHARS)
  segments = [
    segment | {"runs": [run | {"text": shown(run["text"])} for run in segment["runs"]]}
    for segment in sample["segments"]
  ]
  return sample | {"title": data_text.visible(sample["title"]), "segments": segments}
