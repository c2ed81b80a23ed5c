"""Sequences of any length as rows of one length: strided windows, several of them in a row.

Every target is scored once. Windows of a long sequence overlap by half, and of what they share the earlier one scores
it: all targets but the first have at least half a window of context, or all there is.

Letters: T row length  n tokens of a sequence  B rows of a batch.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ultrathink_jax.data.best_fit import best_fit_decreasing
from ultrathink_jax.types import Batch, Context

_LENGTH_STEP = 64  # rows are rounded up to multiples of this, so that few shapes are compiled


class Scored(NamedTuple):
  """Tokens of which each but the first is predicted from those before, and which of these predictions count."""

  tokens: Int[np.ndarray, "n"]
  counts: Bool[np.ndarray, "n"]  # the first is False


class Window(NamedTuple):
  """Inputs `start` to `stop` of a sequence, of which those before `first` are context only."""

  sequence: int
  start: int
  first: int
  stop: int


class Rows(NamedTuple):
  """A batch, and for each of its positions the sequence that its score belongs to; -1 where it counts for none."""

  batch: Batch
  owners: Int[np.ndarray, "B T"]


def windows(sequence: int, num_inputs: int, size: int) -> list[Window]:
  """Returns the windows of a sequence: the last one ends with it, and is as long as the others where it can be."""
  found = [Window(sequence, 0, 0, min(size, num_inputs))]
  while found[-1].stop < num_inputs:
    stop = min(found[-1].stop + max(1, size // 2), num_inputs)
    found.append(Window(sequence, stop - size, found[-1].stop, stop))
  return found


def rows(sequences: Sequence[Scored], size: int, batch_size: int) -> Iterator[Rows]:
  """Yields batches of one shape; windows in which nothing counts are left out."""
  all_windows = [
    window
    for number, sequence in enumerate(sequences)
    for window in windows(number, len(sequence.tokens) - 1, size)
    if sequence.counts[window.first + 1 : window.stop + 1].any()
  ]
  if not all_windows:
    return
  lengths = np.array([window.stop - window.start for window in all_windows])
  T = min(size, -(-int(lengths.max()) // _LENGTH_STEP) * _LENGTH_STEP)
  row_of = best_fit_decreasing(lengths, T)
  order = np.argsort(row_of, kind="stable")
  bounds = np.searchsorted(row_of[order], np.arange(row_of.max() + 2))
  contents = [[all_windows[i] for i in order[low:high]] for low, high in pairwise(bounds)]
  B = min(batch_size, len(contents))
  for start in range(0, len(contents), B):
    yield _lay_out(sequences, contents[start : start + B], B, T)


def _lay_out(sequences: Sequence[Scored], contents: list[list[Window]], B: int, T: int) -> Rows:
  tokens, targets, positions, segment_ids = (np.zeros((B, T), np.int32) for _ in range(4))
  weights, owners = np.zeros((B, T), np.float32), np.full((B, T), -1)
  for row, row_windows in enumerate(contents):
    end = 0
    for segment, (number, start, first, stop) in enumerate(row_windows, 1):
      sequence, here = sequences[number], slice(end, end + stop - start)
      counts = sequence.counts[start + 1 : stop + 1] & (np.arange(start, stop) >= first)
      tokens[row, here], targets[row, here] = sequence.tokens[start:stop], sequence.tokens[start + 1 : stop + 1]
      positions[row, here], segment_ids[row, here] = np.arange(stop - start), segment
      weights[row, here], owners[row, here] = counts, np.where(counts, number, -1)
      end += stop - start
  return Rows(Batch(tokens, targets, weights, Context(positions, segment_ids)), owners)


def sum_by_owner(
  owners: Int[np.ndarray, "B T"], values: Float[np.ndarray, "B T"] | Bool[np.ndarray, "B T"], num_sequences: int
) -> Float[np.ndarray, "sequences"]:
  """Returns the sum of the values that belong to each sequence, in float64."""
  counts = owners >= 0
  return np.bincount(owners[counts], values[counts].astype(np.float64), num_sequences)
