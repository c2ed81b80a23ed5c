"""Fill-in-the-middle: where a stretch of a file is cut into prefix, middle and suffix.

Source: arXiv:2207.14255; cuts at lines and at bodies of functions beside those at characters.
"""

import bisect
from collections.abc import Mapping, Sequence

from ultrathink_jax.data.code.items import Span
from ultrathink_jax.data.code.pieces import Pieces
from ultrathink_jax.data.documents import score


def draw(*parts: object) -> float:
  """Returns a number in [0, 1) that depends on the parts alone, the same on every machine."""
  return score("\0".join(map(str, parts)))


def choose_middle(
  pieces: Pieces, span: Span, bodies: Sequence[Span], levels: Mapping[str, float], key: Sequence[object]
) -> tuple[str, Span]:
  """Returns at which level a span is cut, and its middle; with no body in the span, "item" becomes "line"."""
  level = _choose(levels, draw(*key, "level"))
  inside = [body for body in bodies if span[0] < body[0] and body[1] <= span[1] and pieces.holds(body)]
  if level == "item" and inside:
    return level, inside[int(draw(*key, "body") * len(inside))]
  first, second = draw(*key, "first"), draw(*key, "second")
  if level == "char":
    return level, tuple(sorted((pieces.character(*span, first), pieces.character(*span, second))))
  lines = pieces.lines[bisect.bisect_left(pieces.lines, span[:1]) : bisect.bisect_left(pieces.lines, span[1:])]
  edges = [*(start for start, _ in lines), span[1]]
  low, high = sorted((int(first * len(edges)), int(second * len(edges))))
  if low == high:
    low, high = max(low - 1, 0), max(high, 1)
  return "line", (edges[low], edges[high] if high < len(edges) else span[1])


def _choose(weights: Mapping[str, float], at: float) -> str:
  names = sorted(name for name, weight in weights.items() if weight > 0)
  bounds, total = [], 0.0
  for name in names:
    total += weights[name]
    bounds.append(total)
  return names[min(bisect.bisect_right(bounds, at * total), len(names) - 1)]
