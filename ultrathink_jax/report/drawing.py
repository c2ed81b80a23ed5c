"""How figures look: SVG elements whose colours are CSS variables of the page, such as --ink and --grid.

Letters: S points of a curve.
"""

import html
import io
import re
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# The light-mode colours; on the page each becomes the CSS variable of its name.
INK, MUTED, GRID = "#1f2429", "#68707a", "#dfe3e8"
BLUE, ORANGE = "#2563b8", "#d1601f"
MANY = (BLUE, ORANGE, "#2a8c5a", "#8a4fbf", "#b8952a", "#c2407f", "#2f9fb3", "#7a7f87")  # readable on light and dark
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BLUE: "blue", ORANGE: "orange"}
STYLE = {
  "figure.facecolor": "none",
  "axes.facecolor": "none",
  "svg.fonttype": "none",  # real text, in the font of the page
  "font.size": 12,
  "axes.labelsize": 12,
  "axes.labelcolor": MUTED,
  "axes.titlesize": 12,
  "axes.titlelocation": "left",
  "axes.titlecolor": INK,
  "axes.edgecolor": GRID,
  "axes.linewidth": 1.0,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": GRID,
  "grid.linewidth": 0.8,
  "text.color": INK,
  "xtick.color": GRID,
  "ytick.color": GRID,
  "xtick.labelcolor": MUTED,
  "ytick.labelcolor": MUTED,
  "xtick.labelsize": 11,
  "ytick.labelsize": 11,
  "legend.frameon": False,
  "legend.fontsize": 12,
  "lines.linewidth": 1.8,
  "lines.solid_joinstyle": "round",
}
WIDE_PIXELS, NARROW_PIXELS = 1000, 460  # figures are drawn for these widths and scale with the page
MAX_POINTS = 1000  # of a drawn line


class Plot(NamedTuple):
  """One figure of the report, drawn for a wide page and for a narrow one."""

  title: str
  note: str
  wide: str
  narrow: str


def label_axes(axes: Axes, ylabel: str) -> None:
  axes.set_xlabel("step")
  axes.set_ylabel(ylabel)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.yaxis.set_major_locator(MaxNLocator(5))
  axes.xaxis.set_major_formatter(FuncFormatter(format_tick))
  axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
  axes.margins(x=0.01)


def format_tick(value: Real, _: int | None = 0) -> str:
  """Returns 12,000, 0.25 or 3e-4."""
  if value == 0 or 1e-3 <= abs(value) < 1e7:
    text = f"{value:,.4f}".rstrip("0").rstrip(".")
  else:
    mantissa, exponent = f"{value:.2e}".split("e")
    text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
  return text.replace("-", "\N{MINUS SIGN}")


def render(
  draw: Callable[[Figure], None], width_pixels: int, height_pixels: int, name: str, layout: str = "constrained"
) -> str:
  """Returns the figure that `draw` draws as an SVG element that fills the width of its parent."""
  with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
    figure = Figure(figsize=(width_pixels / 72, height_pixels / 72), layout=layout)
    draw(figure)
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :]
  box = re.search(r'viewBox="[^"]*"', svg).group()
  svg = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{html.escape(name)}">', svg, count=1)
  svg = re.sub(r' id="[\w.]+_\d+"|<metadata>.*?</metadata>|<!--.*?-->', "", svg, flags=re.DOTALL)
  for color, variable in VARIABLES.items():
    svg = svg.replace(color, f"var(--{variable})")
  return re.sub(r"\n\s*", "\n", svg)


def draw_line(
  axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str = "", is_log: bool = False
) -> None:
  """Draws a curve; a long one lightly smoothed, with its raw values behind."""
  if np.isfinite(values).sum() <= 40:
    axes.plot(steps, values, "o-", color=color, markersize=4, linewidth=1.5, label=label)
    if len(steps) == 1:
      axes.set_xlim(steps[0] - 1, steps[0] + 1)
    return
  axes.plot(*thin(steps, values), color=color, linewidth=0.8, alpha=0.3)
  trend = np.exp(smooth(np.log(values))) if is_log else smooth(values)
  axes.plot(*thin(steps, trend), color=color, label=label)


def smooth(values: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"]:
  """Returns `values` averaged twice over a centred window of 1%; NaN is left out.

  The window shrinks towards the start, where a loss is steep, and only loses its right side towards the end.
  """
  offset = values[np.isfinite(values)][0]  # keeps a constant constant to the last bit
  values = values - offset
  index = np.arange(len(values))
  left = np.minimum(index, len(values) // 200 + 1)
  right = np.minimum(left, index[::-1])
  for _ in range(2):
    sums = np.concatenate([[0.0], np.nancumsum(values)])
    counts = np.concatenate([[0], np.cumsum(np.isfinite(values))])
    counts = counts[index + right + 1] - counts[index - left]
    sums = sums[index + right + 1] - sums[index - left]
    values = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
  return values + offset


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns at most about MAX_POINTS points that look the same: the least and the greatest value of each stretch."""
  if len(values) <= MAX_POINTS:
    return steps, values
  kept: list[int] = []
  for stretch in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
    if np.isfinite(values[stretch]).any():
      kept += sorted({int(stretch[np.nanargmin(values[stretch])]), int(stretch[np.nanargmax(values[stretch])])})
    else:
      kept.append(int(stretch[0]))
  return steps[kept], values[kept]


def span(steps: np.ndarray) -> tuple[float, float]:
  """Returns the first and last step, or the neighbours of a single one."""
  start, end = float(steps.min()), float(steps.max())
  return (start, end) if start < end else (start - 1, end + 1)
