"""Documents of an epoch laid end to end and cut into rows, each row found without the ones before it.

A document of tokens t1..tn takes n+1 positions: inputs BOS t1..tn, targets t1..tn EOS. BOS is never a target and EOS
never an input, and every token is predicted once. A document that crosses a cut goes on in the next row, where its
positions count from 0 again and what came before is out of sight.

Letters: T row length.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Span(NamedTuple):
  """Positions `start` to `stop` of one document, of its length + 1."""

  document: int
  start: int
  stop: int


class Row(NamedTuple):
  """One packed row, int32 and float32; what is left of a row is padding with segment id 0 and weight 0."""

  tokens: Int[np.ndarray, "T"]
  targets: Int[np.ndarray, "T"]
  weights: Float[np.ndarray, "T"]
  segment_ids: Int[np.ndarray, "T"]
  positions: Int[np.ndarray, "T"]


class Packing:
  """The rows of every epoch.

  With a seed, each epoch is a permutation of its own, of the documents and then of the rows, so that a batch holds rows
  of different documents; and the ragged row at its end is left out (fewer than T
  positions, other ones each epoch) unless it is the only one. Without a seed, documents stay in order and the last row
  is padded, so that each position is in exactly one row.
  """

  def __init__(self, lengths: Int[np.ndarray, "documents"], sequence_length: int, seed: int | None):
    self._sizes = np.asarray(lengths, np.int64) + 1
    self._sequence_length = sequence_length
    self._seed = seed
    self.num_positions = int(self._sizes.sum())
    full_rows, rest = divmod(self.num_positions, sequence_length)
    self.rows_per_epoch = max(full_rows, int(rest > 0)) if seed is not None else full_rows + int(rest > 0)
    self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)

  def spans(self, epoch: int, row: int) -> list[Span]:
    """Returns which parts of which documents fill a row, left to right."""
    if not 0 <= row < self.rows_per_epoch:
      raise IndexError(f"row {row} of {self.rows_per_epoch}")
    order, starts, rows = self._epoch(epoch if self._seed is not None else 0)
    low = int(rows[row]) * self._sequence_length
    high = min(low + self._sequence_length, self.num_positions)
    first = int(np.searchsorted(starts, low, "right")) - 1
    last = int(np.searchsorted(starts, high, "left"))
    return [
      Span(int(order[i]), max(low - int(starts[i]), 0), min(high, int(starts[i + 1])) - int(starts[i]))
      for i in range(first, last)
    ]

  def row(self, epoch: int, row: int, read: Callable[[int], np.ndarray], bos_id: int, eos_id: int) -> Row:
    """Returns a row, reading the documents in it."""
    filled = empty_row(self._sequence_length)
    at = 0
    for segment, (document, start, stop) in enumerate(self.spans(epoch, row), 1):
      tokens = read(document)
      here = slice(at, at + stop - start)
      filled.tokens[here] = np.concatenate(([bos_id], tokens))[start:stop]
      filled.targets[here] = np.concatenate((tokens, [eos_id]))[start:stop]
      filled.weights[here] = 1.0
      filled.segment_ids[here] = segment
      filled.positions[here] = np.arange(stop - start)
      at += stop - start
    return filled

  def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the order of the documents, where each starts, and the order of the rows."""
    order, rows = np.arange(len(self._sizes)), np.arange(self.rows_per_epoch)
    if self._seed is not None:
      random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch))))
      order, rows = random.permutation(order), random.permutation(rows)
    return order, np.concatenate(([0], np.cumsum(self._sizes[order]))), rows


def empty_row(sequence_length: int) -> Row:
  """Returns a row of padding."""
  return Row(*(np.zeros(sequence_length, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
