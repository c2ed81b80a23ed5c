"""Best-fit decreasing bin packing of whole numbers, for millions of items."""

from bisect import bisect_left, insort

import numpy as np
from jaxtyping import Int


def best_fit_decreasing(sizes: Int[np.ndarray, "items"], capacity: int) -> Int[np.ndarray, "items"]:
  """Returns the bin of each item, counted from 0: largest items first, each into the fullest bin that has room for it.

  Sizes are from 1 to `capacity`. Among items of one size the earlier ones come first.

  The items of one size fill a bin as far as they can before another bin is the fullest with room, and bins that are
  equally full are alike. So each turn of the loop gives the same number of items to each bin of a range: turns grow
  with the number of different sizes and fills, not with the number of items.
  """
  descending = -np.asarray(sizes, np.int64)
  order = np.argsort(descending, kind="stable")
  values, counts = np.unique(descending[order], return_counts=True)
  rooms: list[int] = []  # that some bin has left, in ascending order
  bins: dict[int, list[tuple[int, int]]] = {}  # by room: ranges as first bin and how many
  placed: list[tuple[int, int, int]] = []  # first bin, how many, items that each takes
  num_bins = 0
  for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
    while count:
      at = bisect_left(rooms, size)
      is_open = at < len(rooms)
      room = rooms[at] if is_open else capacity
      start, available = bins[room].pop() if is_open else (num_bins, count)
      each = min(room // size, count)
      taken = min(available, count // each)
      placed.append((start, taken, each))
      count -= taken * each
      if not is_open:
        num_bins += taken
      elif taken < available:
        bins[room].append((start + taken, available - taken))
      elif not bins[room]:
        del rooms[at]
      left = room - each * size
      ranges = bins.setdefault(left, [])
      if not ranges:
        insort(rooms, left)
      ranges.append((start, taken))
  return _expand(order, placed)


def _expand(order: Int[np.ndarray, "items"], placed: list[tuple[int, int, int]]) -> Int[np.ndarray, "items"]:
  starts, taken, each = np.array(placed, np.int64).reshape(-1, 3).T
  counts = taken * each
  turn = np.repeat(np.arange(len(counts)), counts)
  within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
  bins = np.empty(len(order), np.int64)
  bins[order] = starts[turn] + within // each[turn]
  return bins
