"""The curves of a report."""

import itertools
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ultrathink_jax.report.drawing import (
  BLUE,
  MANY,
  MUTED,
  NARROW_PIXELS,
  ORANGE,
  WIDE_PIXELS,
  Plot,
  draw_line,
  format_tick,
  label_axes,
  render,
  span,
)
from ultrathink_jax.report.run import Run, other_keys, series


def loss(run: Run) -> Plot | None:
  """Returns training and validation loss, with the loss of a uniform guess where the run starts near it."""
  steps, values = series(run.metrics, "loss")
  validation_steps, validation = series([*run.evaluations, *_final_evaluation(run)], "evaluate/loss")
  if not np.isfinite(values).any() and not np.isfinite(validation).any():
    return None
  vocab_size = run.setting("model", "vocab_size")
  finite = values[np.isfinite(values)]
  uniform = math.log(vocab_size) if vocab_size else math.inf
  is_near_uniform = finite.size > 0 and bool(uniform < 1.4 * finite[0])

  start, end = span(np.concatenate([steps, validation_steps]))

  def draw(figure: Figure) -> None:
    axes = figure.add_subplot()
    draw_line(axes, steps, values, BLUE, "training")
    if validation.size:
      axes.plot(validation_steps, validation, "o-", color=ORANGE, markersize=4.5, linewidth=1.2, label="validation")
    if is_near_uniform:
      axes.plot([start, start + 0.12 * (end - start)], [uniform] * 2, color=MUTED, linewidth=1.2, linestyle=(0, (3, 2)))
      text = f"ln V = {uniform:.2f}, a uniform guess"
      axes.annotate(text, (start + 0.12 * (end - start), uniform), (6, -4), textcoords="offset points", color=MUTED)
    shown = np.concatenate([finite, validation[np.isfinite(validation)], [uniform] if is_near_uniform else []])
    # A few spikes may leave the frame, the curve may not be squashed by them.
    bottom, top = shown.min(), max(np.percentile(shown, 99.5), shown[0], uniform if is_near_uniform else 0)
    margin = 0.06 * (top - bottom) or 0.5
    axes.set_ylim(bottom - margin, top + margin)
    label_axes(axes, "nats per token")
    axes.set_xlim(start - 0.01 * (end - start), end + 0.01 * (end - start))
    _mark_resumes(axes, [step for step in run.fact("resumed_from_steps") or () if start < step < end])
    if steps.size and validation.size:
      axes.legend(loc="upper right")

  return Plot("Loss", "", render(draw, WIDE_PIXELS, 380, "loss-wide"), render(draw, NARROW_PIXELS, 320, "loss-narrow"))


def scalar(run: Run, key: str, title: str, unit: str, scale: str = "free") -> Plot | None:
  """Returns the curve of one metric. `scale` of y: free, zero (from 0 up), or log (zero, unless it spans decades)."""
  steps, values = series(run.metrics, key)
  if not np.isfinite(values).any():
    return None

  def draw(figure: Figure) -> None:
    axes = figure.add_subplot()
    finite = values[np.isfinite(values)]
    is_log = scale == "log" and bool(0 < finite.min() < finite.max() / 30)
    draw_line(axes, steps, values, BLUE, is_log=is_log)
    label_axes(axes, unit)
    if is_log:
      axes.set_yscale("log")
      is_long = math.log10(finite.max() / finite.min()) > 3
      axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_long else (1, 2, 5)))
      axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
      axes.yaxis.set_minor_formatter(NullFormatter())
    elif scale != "free":
      axes.set_ylim(bottom=min(0, finite.min()))

  svg = render(draw, NARROW_PIXELS, 250, key)
  return Plot(title, "", svg, svg)


def together(run: Run, prefix: str, title: str, unit: str) -> Plot | None:
  """Returns the curves of all metrics whose names begin with `prefix`, over powers of ten."""
  keys = [key for key in other_keys(run, set()) if key.startswith(prefix)]
  curves = {key.removeprefix(prefix): series(run.metrics, key) for key in keys}
  curves = {name: (steps, values) for name, (steps, values) in curves.items() if np.any(values > 0)}
  if not curves:
    return None

  def draw(figure: Figure) -> None:
    axes = figure.add_subplot()
    for color, (name, (steps, values)) in zip(itertools.cycle(MANY), curves.items(), strict=False):
      axes.plot(steps, np.where(values > 0, values, np.nan), color=color, linewidth=1.2, label=name)
    label_axes(axes, unit)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=4, fontsize=10, columnspacing=1)

  svg = render(draw, NARROW_PIXELS, 290, prefix.strip("/"))
  return Plot(title, "", svg, svg)


def _final_evaluation(run: Run) -> list[dict[str, Any]]:
  """Returns run.json's result as an evaluation, where the run did not record one at that step."""
  step, value = run.fact("result", "step"), run.fact("result", "loss")
  is_new = value is not None and step is not None and all(row["step"] < step for row in run.evaluations)
  return [{"step": step, "evaluate/loss": value}] if is_new else []


def _mark_resumes(axes: Axes, steps: list[int]) -> None:
  for step in steps:
    axes.axvline(step, ymax=0.85, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate("resumed", (step, 0), (3, 4), ("data", "axes fraction"), "offset points", color=MUTED, fontsize=11)
