"""How evenly the experts of a run were used.

Letters: S logged steps, E experts, C columns of a heat map.
"""

import itertools
from collections.abc import Callable
from numbers import Real

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ultrathink_jax.report.drawing import (
  BLUE,
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
from ultrathink_jax.report.run import Run, expert_loads, series

MAX_COLUMNS, MAX_CELLS = 200, 400_000  # of one heat map; of all of them
LEGEND_PIXELS, AXIS_PIXELS, TITLE_PIXELS = 76, 44, 24  # above all panels; below the last; above each

# Transparent where the share is even, so that it fits a light and a dark page.
LOAD_COLORS = LinearSegmentedColormap.from_list(
  "load", [(0, (0.13, 0.39, 0.77, 1)), (0.5, (0.5, 0.5, 0.5, 0)), (1, (0.85, 0.37, 0.08, 1))], N=33
)  # few colours compress well


def expert_load(run: Run) -> Plot | None:
  """Returns one heat map per layer of experts: step x expert, with bars of the last logged shares beside it."""
  steps, loads = expert_loads(run)
  if not loads:
    return None
  ratios = {layer: load * load.shape[1] for layer, load in loads.items()}
  deviations = np.concatenate([np.abs(np.log2(np.maximum(ratio, 1e-3))).ravel() for ratio in ratios.values()])
  doublings = int(np.clip(np.ceil(np.nanpercentile(deviations, 98)), 1, 3))  # the colours span 1/2^n to 2^n
  num_cells = sum(ratio.shape[1] for ratio in ratios.values())
  num_heat_columns = min(len(steps), max(MAX_CELLS // num_cells, 40), MAX_COLUMNS)
  distance = max(np.nanmax(np.abs(ratio[-1] - 1)) for ratio in ratios.values())
  reach = next((limit for limit in (0.25, 0.5, 1, 2, 4, 8, 16) if distance <= limit), distance)  # of the bars
  names, bounds = _groups(run)
  panel_pixels = 110 if names else int(np.clip(6 * max(ratio.shape[1] for ratio in ratios.values()), 56, 110))
  margin_pixels = 90 if names else 48  # left of a heat map

  def draw(figure: Figure, width_pixels: int, height_pixels: int, num_columns: int) -> None:
    def place(left: Real, top: Real, width: Real, height: Real) -> Axes:
      """Returns new axes at pixels counted from the top left corner; a layout engine takes seconds for 50 layers."""
      bottom = height_pixels - top - height
      return figure.add_axes(
        (left / width_pixels, bottom / height_pixels, width / width_pixels, height / height_pixels)
      )

    _draw_legend(place(0.3 * width_pixels, 20, 0.4 * width_pixels, 12), doublings)
    pitch = width_pixels / num_columns
    for index, (layer, ratio) in enumerate(ratios.items()):
      row, column = divmod(index, num_columns)
      left, top = column * pitch + margin_pixels, LEGEND_PIXELS + row * (panel_pixels + TITLE_PIXELS)
      heat_pixels = 0.8 * pitch - 32 - margin_pixels
      heat = place(left, top, heat_pixels, panel_pixels)
      bars = place(left + heat_pixels + 38, top, 0.2 * pitch - 26, panel_pixels)
      _draw_heat(heat, steps, ratio, num_heat_columns, doublings)
      _draw_bars(bars, ratio[-1], reach)
      if names:
        _mark_groups(heat, bars, names, bounds)
      heat.set_title(layer)
      if row == 0:
        bars.set_title("at the end", color=MUTED, fontsize=11, loc="center")
      if index + num_columns < len(ratios):
        heat.set_xlabel("")
        for axes in (heat, bars):
          axes.tick_params(labelbottom=False)

  def render_columns(name: str, width_pixels: int, num_columns: int) -> str:
    num_rows = -(-len(ratios) // num_columns)
    height_pixels = LEGEND_PIXELS + num_rows * (panel_pixels + TITLE_PIXELS) - TITLE_PIXELS + AXIS_PIXELS
    size = (width_pixels, height_pixels)
    return render(lambda figure: draw(figure, *size, num_columns), *size, name, layout="none")

  return Plot(
    "Expert load",
    "Rows are experts. Blank is an even share, 1/E of the tokens.",
    render_columns("load-wide", WIDE_PIXELS, 1 if len(ratios) == 1 else 2),
    render_columns("load-narrow", NARROW_PIXELS, 1),
  )


def _groups(run: Run) -> tuple[list[str], Int[np.ndarray, "bounds"]]:
  """Returns the names of the groups of experts, and the expert that each begins with and that would follow the last."""
  spelled = run.setting("model", "expert_groups") or ""
  pairs = [item.partition("=")[::2] for item in spelled.split(",") if item]
  return [name for name, _ in pairs], np.cumsum([0, *(int(size) for _, size in pairs)])


def _mark_groups(heat: Axes, bars: Axes, names: list[str], bounds: Int[np.ndarray, "bounds"]) -> None:
  """Draws a line between groups and writes their names where a number of the expert would be."""
  for axes in (heat, bars):
    for bound in bounds[1:-1]:
      axes.axhline(bound - 0.5, color=MUTED, linewidth=0.8)
  heat.set_ylabel("")
  heat.set_yticks((bounds[:-1] + bounds[1:] - 1) / 2, names)
  heat.tick_params(axis="y", length=0)


def _draw_legend(axes: Axes, doublings: int) -> None:
  colors = np.linspace(-1, 1, LOAD_COLORS.N)[None]
  extent = (-doublings, doublings, 0, 1)
  axes.imshow(colors, cmap=LOAD_COLORS, extent=extent, aspect="auto", interpolation="none")
  ticks = range(-doublings, doublings + 1)
  axes.set_xticks(ticks, [f"1/{2**-tick}" if tick < 0 else f"{2**tick}" for tick in ticks])
  axes.set_yticks([])
  axes.grid(False)
  axes.spines[:].set_visible(True)
  axes.tick_params(length=0, pad=3)
  axes.set_title("share of the tokens relative to an even share", color=MUTED, loc="center")


def _draw_heat(
  axes: Axes, steps: Int[np.ndarray, "S"], ratio: Float[np.ndarray, "S E"], num_columns: int, doublings: int
) -> None:
  num_experts = ratio.shape[1]
  start, end = span(steps)
  axes.imshow(
    np.log2(np.maximum(_columns(steps, ratio, num_columns), 1e-3)).T,
    aspect="auto",
    interpolation="none",
    origin="lower",
    extent=(start, end, -0.5, num_experts - 0.5),
    cmap=LOAD_COLORS,
    vmin=-doublings,
    vmax=doublings,
  )
  axes.grid(False)
  axes.spines[:].set_visible(True)
  label_axes(axes, "expert")
  axes.set_yticks([0, num_experts - 1] if num_experts > 1 else [0])


def _draw_bars(axes: Axes, ratio: Float[np.ndarray, "E"], reach: Real) -> None:
  num_experts = len(ratio)
  edges = np.arange(num_experts + 1) - 0.5
  for shares, color in ((np.minimum(ratio, 1), BLUE), (np.maximum(ratio, 1), ORANGE)):
    axes.stairs(shares, edges, baseline=1, orientation="horizontal", fill=True, color=color, alpha=0.85)
  axes.axvline(1, color=MUTED, linewidth=1)
  axes.grid(False)
  axes.spines.left.set_visible(False)
  axes.set_xlim(max(0, 1 - reach), 1 + reach)
  axes.set_xticks(axes.get_xlim(), [format_tick(limit) for limit in axes.get_xlim()])
  axes.set_ylim(edges[0], edges[-1])
  axes.set_yticks([])


def _columns(
  steps: Int[np.ndarray, "S"], values: Float[np.ndarray, "S E"], num_columns: int
) -> Float[np.ndarray, "C E"]:
  """Returns `values` at evenly spaced steps: the mean of the rows in each column, or the nearest row."""
  edges = np.linspace(steps[0], steps[-1], num_columns + 1)
  bounds = np.searchsorted(steps, edges)
  bounds[-1] = len(steps)
  columns = []
  for column, (low, high) in enumerate(itertools.pairwise(bounds)):
    if low == high:
      low = int(np.abs(steps - edges[column : column + 2].mean()).argmin())
      high = low + 1
    columns.append(values[low:high].mean(axis=0))
  return np.array(columns)


def routing(run: Run) -> Plot | None:
  """Returns how evenly the router spreads the tokens, and how many it dropped if it dropped any."""
  columns = {key: series(run.metrics, key) for key in ("moe/entropy", "moe/max_expert", "moe/dropped")}
  columns = {key: (steps, values) for key, (steps, values) in columns.items() if np.isfinite(values).any()}
  if not columns:
    return None
  is_any_dropped = "moe/dropped" in columns and np.nansum(columns["moe/dropped"][1]) > 0
  shown = [key for key in columns if key != "moe/dropped" or is_any_dropped]
  labels = {
    "moe/entropy": ("entropy", "1 = even use"),
    "moe/max_expert": ("busiest expert", "% of the tokens"),
    "moe/dropped": ("dropped", "% of the tokens"),
  }
  _, loads = expert_loads(run)
  num_experts = max((load.shape[1] for load in loads.values()), default=run.setting("model", "num_experts"))

  def draw_rows(num_rows: int) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
      for index, key in enumerate(shown):
        axes = figure.add_subplot(num_rows, -(-len(shown) // num_rows), index + 1)
        steps, values = columns[key]
        draw_line(axes, steps, values if key == "moe/entropy" else 100 * values, BLUE)
        title, unit = labels[key]
        axes.set_title(title)
        label_axes(axes, unit)
        if key != "moe/entropy":
          axes.set_ylim(bottom=0)
        if key == "moe/max_expert" and num_experts:
          even = 100 / num_experts
          axes.axhline(even, color=ORANGE, linewidth=1.2)
          text = f"even share, {even:.3g}%"
          axes.annotate(text, (0.01, even), (0, -14), ("axes fraction", "data"), "offset points", color=ORANGE)

    return draw

  notes = ["No token was dropped."] if "moe/dropped" in columns and not is_any_dropped else []
  num_dead = run.metrics[-1].get("moe/dead")
  if num_dead:
    notes.append(f"At the end, {num_dead} experts get less than a tenth of an even share.")
  wide = render(draw_rows(1), WIDE_PIXELS, 270, "routing-wide")
  return Plot(
    "Routing", " ".join(notes), wide, render(draw_rows(len(shown)), NARROW_PIXELS, 250 * len(shown), "routing-narrow")
  )
