"""A file cut into chunks of at most so many tokens, between items where that wastes no more than half a chunk."""

import bisect
from collections.abc import Callable, Collection, Iterator

from ultrathink_jax.data.code.items import Span
from ultrathink_jax.data.code.pieces import Pieces


def cut(
  pieces: Pieces,
  boundaries: Collection[int],
  header: str,
  max_tokens: int,
  overlap_tokens: int,
  count_tokens: Callable[[str], int],
) -> Iterator[Span]:
  """Yields spans whose texts, after the header, have at most `max_tokens` tokens.

  Each begins with as many of the last lines of the one before as have at most `overlap_tokens` tokens. Chunks end
  before one of `boundaries` where one is in their second half, else after a blank line, else after a line; only a line
  that is longer than half a chunk is cut.
  """
  if count_tokens(header + pieces.text(*pieces.span)) <= max_tokens:
    yield pieces.span
    return
  budget = max_tokens - count_tokens(header)
  units = list(_units(pieces, max(1, budget // 2), count_tokens))
  starts = [start for (start, _), _ in units]
  totals = [0]  # tokens before each unit, summed by unit, which is close to what they have together
  for _, tokens in units:
    totals.append(totals[-1] + tokens)
  good = {bisect.bisect_left(starts, boundary) for boundary in boundaries}
  blank = {i + 1 for i, ((start, stop), _) in enumerate(units) if not pieces.stretch(start, stop).strip()}

  def size(first: int, last: int) -> int:
    return count_tokens(header + pieces.text(units[first][0][0], units[last - 1][0][1]))

  first, done = 0, 0  # units before `done` are in a chunk already
  while done < len(units):
    last = max(bisect.bisect_right(totals, totals[first] + budget) - 1, done + 1)
    if last < len(units):
      half = max(bisect.bisect_left(totals, totals[first] + budget // 2), done + 1)
      choices = range(last, half - 1, -1)
      last = next((i for i in choices if i in good), next((i for i in choices if i in blank), last))
    while size(first, last) > max_tokens and last - first > 1:
      if last > done + 1:
        last -= 1
      else:
        first += 1
    yield units[first][0][0], units[last - 1][0][1]
    done = last
    if done < len(units):
      room = min(overlap_tokens, budget - units[done][1])
      first = min(bisect.bisect_left(totals, totals[done] - room), done)
      while first < done and count_tokens(pieces.text(units[first][0][0], units[done - 1][0][1])) > overlap_tokens:
        first += 1


def _units(pieces: Pieces, max_tokens: int, count_tokens: Callable[[str], int]) -> Iterator[tuple[Span, int]]:
  """Yields the lines, and the parts of those with more than `max_tokens` tokens, and how many tokens each has."""
  pending = pieces.lines[::-1]
  while pending:
    start, stop = pending.pop()
    tokens = count_tokens(pieces.stretch(start, stop))
    middle = pieces.character(start, stop, 0.5) if tokens > max_tokens else start
    if start < middle < stop:
      pending += [(middle, stop), (start, middle)]
    else:
      yield (start, stop), tokens
