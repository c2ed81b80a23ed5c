"""The figures of a comparison of two models.

Letters: L layers of experts  E experts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ultrathink_jax.report.drawing import BLUE, MUTED, NARROW_PIXELS, ORANGE, WIDE_PIXELS, Plot, format_tick, render
from ultrathink_jax.report.experts import LOAD_COLORS

_LEAST_SHARE = 1e-3  # of an even share, below which colours do not tell shares apart
_ROW_PIXELS = 26


def gains(rows: Mapping[str, Mapping[str, Any]]) -> Plot:
  """Returns what was gained on each group of documents, with the interval of 95 %; losses are orange."""
  names = list(rows)[::-1]

  def draw(figure: Figure) -> None:
    axes = figure.add_subplot()
    for place, name in enumerate(names):
      gain = rows[name]["improvement"]
      value, interval = gain["nats_per_target"], gain["interval"]
      color = BLUE if value >= 0 else ORANGE
      if interval is not None:
        axes.plot(interval, [place, place], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
      axes.plot([value], [place], "o", color=color, markersize=7)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(names)), [_escaped(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("nats per token gained over the base model")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(format_tick))
    axes.grid(visible=False, axis="y")

  height = 70 + _ROW_PIXELS * len(names)
  wide, narrow = (render(draw, width, height, f"gains-{width}") for width in (WIDE_PIXELS, NARROW_PIXELS))
  return Plot("What fine-tuning gained", "Bars are the interval of 95 % over documents.", wide, narrow)


def routing(layers: list[dict[str, Any]]) -> Plot:
  """Returns heat maps of both models' shares, layer x expert, and the divergence of each layer."""
  shares = [_ratios(layers, name) for name in ("base_model", "finetuned_model")]
  doublings = int(np.clip(np.ceil(np.percentile(np.abs(shares), 98)), 1, 3))  # the colours span 1/2^n to 2^n
  numbers, height = [layer["layer"] for layer in layers], 60 + min(420, max(80, 18 * len(layers)))
  shown = range(0, len(layers), -(-len(layers) // 16))

  def draw(figure: Figure, num_rows: int) -> None:
    all_axes = figure.subplots(num_rows, 3 // num_rows, squeeze=False).ravel()
    for axes, title, ratios in zip(all_axes[:2], ("base model", "fine-tuned model"), shares, strict=True):
      image = axes.imshow(
        ratios, cmap=LOAD_COLORS, vmin=-doublings, vmax=doublings, aspect="auto", interpolation="none"
      )
      axes.grid(visible=False)
      axes.spines[:].set_visible(True)
      axes.set_xlabel("expert")
      axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
      axes.set_title(title)
    bar = figure.colorbar(image, ax=list(all_axes[:2]), location="top", shrink=0.5, aspect=40)
    ticks = range(-doublings, doublings + 1)
    bar.set_ticks(ticks, labels=[f"1/{2**-tick}" if tick < 0 else f"{2**tick}" for tick in ticks])
    bar.set_label("share of the choices relative to an even share")
    bars = all_axes[2]
    colors = [ORANGE if layer["is_collapsed"] else BLUE for layer in layers]
    bars.barh(range(len(layers)), [layer["divergence"] for layer in layers], 0.8, color=colors)
    bars.set_title("how far routing moved")
    bars.set_xlabel("Jensen-Shannon divergence, bits")
    bars.xaxis.set_major_locator(MaxNLocator(4))
    bars.xaxis.set_major_formatter(FuncFormatter(format_tick))
    bars.set_xlim(left=0)
    bars.set_ylim(len(layers) - 0.5, -0.5)
    bars.grid(visible=False, axis="y")
    for axes in all_axes:
      axes.set_yticks(shown, [numbers[at] for at in shown])
      axes.set_ylabel("layer")

  return Plot(
    "Routing before and after",
    _note(layers),
    render(lambda figure: draw(figure, 1), WIDE_PIXELS, height + 70, "routing-shift-wide"),
    render(lambda figure: draw(figure, 3), NARROW_PIXELS, 3 * height + 70, "routing-shift-narrow"),
  )


def _ratios(layers: list[dict[str, Any]], model: str) -> Float[np.ndarray, "L E"]:
  """Returns log2 of each expert's share relative to an even one."""
  shares = np.array([layer[model]["shares"] for layer in layers])
  return np.log2(np.maximum(shares * shares.shape[1], _LEAST_SHARE))


def _note(layers: list[dict[str, Any]]) -> str:
  collapsed = [str(layer["layer"]) for layer in layers if layer["is_collapsed"]]
  note = "Blank is an even share. Both models read the same tokens."
  return f"{note} Collapsed onto one expert: layer {', '.join(collapsed)}." if collapsed else note


def _escaped(name: str) -> str:
  """Returns a name of which matplotlib reads no sign as mathematics."""
  return name.replace("$", r"\$")
