"""A file of which stretches may be cut out: everything is addressed by bytes of the whole file."""

import bisect
import functools
from collections.abc import Iterable

from ultrathink_jax.data.code.items import Span


class Pieces:
  """What is left of a file's content; a span that reaches over a cut gives the text on both sides of it."""

  def __init__(self, content: bytes, cuts: Iterable[Span] = ()):
    self._content = content
    self.ranges: list[Span] = []
    start = 0
    for cut_start, cut_stop in sorted(cuts):
      if cut_start > start:
        self.ranges.append((start, cut_start))
      start = max(start, cut_stop)
    if start < len(content):
      self.ranges.append((start, len(content)))
    self._sizes = [0]
    for start, stop in self.ranges:
      self._sizes.append(self._sizes[-1] + stop - start)

  @property
  def num_bytes(self) -> int:
    """Bytes that are left."""
    return self._sizes[-1]

  @property
  def span(self) -> Span:
    """From the first byte that is left to the last."""
    return (self.ranges[0][0], self.ranges[-1][1]) if self.ranges else (0, 0)

  def text(self, start: int, stop: int) -> str:
    """Returns what is left between two bytes of the file, which begin characters."""
    parts = (
      self._content[max(start, low) : min(stop, high)] for low, high in self.ranges if low < stop and high > start
    )
    return b"".join(parts).decode()

  def stretch(self, start: int, stop: int) -> str:
    """Returns the text of a span of which nothing is cut out."""
    return self._content[start:stop].decode()

  @functools.cached_property
  def lines(self) -> list[Span]:
    """The spans of the lines that are left, each with its end."""
    lines = []
    for start, stop in self.ranges:
      while start < stop:
        end = self._content.find(b"\n", start, stop) + 1 or stop
        lines.append((start, end))
        start = end
    return lines

  def character(self, start: int, stop: int, fraction: float) -> int:
    """Returns the byte where a character begins that lies at a fraction, below 1, of what is left of a span."""
    low, high = self._index(start), self._index(stop)
    index = low + int(fraction * (high - low + 1))
    number = min(bisect.bisect_right(self._sizes, index), len(self.ranges)) - 1
    byte = self.ranges[number][0] + index - self._sizes[number]
    while byte < len(self._content) and self._content[byte] & 0xC0 == 0x80:
      byte -= 1
    return min(max(byte, start), stop)

  def holds(self, span: Span) -> bool:
    """Returns whether nothing of a span is cut out."""
    return any(start <= span[0] and span[1] <= stop for start, stop in self.ranges)

  def _index(self, byte: int) -> int:
    """Returns how much is left before a byte."""
    number = bisect.bisect_right(self.ranges, (byte, len(self._content) + 1)) - 1
    if number < 0:
      return 0
    start, stop = self.ranges[number]
    return self._sizes[number] + min(byte, stop) - start
