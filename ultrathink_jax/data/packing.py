"""Documents packed into rows of one length, each row of each epoch found without the ones before it.

A document of tokens t1..tn takes n+1 positions: inputs BOS t1..tn, targets t1..tn EOS. BOS is never a target and EOS
never an input, and every token is predicted once an epoch. Where a document is cut, what follows is a segment of its
own: its positions count from 0 again and what came before is out of sight.

Letters: T row length.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from ultrathink_jax.data.best_fit import best_fit_decreasing

Seed = int | tuple[int, ...]


class Example(NamedTuple):
  """The tokens of a document, int32, without BOS and EOS, and whether the model learns to predict each of them.

  EOS is learned where any token is, and in an empty document.
  """

  tokens: Int[np.ndarray, "n"]
  is_learned: Bool[np.ndarray, "n"]


@runtime_checkable
class TokenSource(Protocol):
  """Documents by random access from any thread; `name` is what people call them."""

  name: str
  lengths: Int[np.ndarray, "documents"]

  def example(self, index: int) -> Example: ...


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


@runtime_checkable
class Packing(Protocol):
  """Which parts of which documents each row of each epoch holds; every position of every document once an epoch."""

  num_positions: int
  rows_per_epoch: int

  def spans(self, epoch: int, row: int) -> list[Span]:
    """Returns what fills a row, left to right."""
    ...


class Split:
  """Documents laid end to end and cut where a row is full: no more than one row of an epoch has padding.

  With a seed, each epoch is a permutation of its own, of the documents and then of the rows, so that a batch holds rows
  of different documents. Without a seed, documents and rows stay in order. With a `limit`, what a row holds of a
  document is cut further, into spans of at most so many positions.

  Takes 40 bytes for each document and 16 for each row, as the last two epochs that were asked for are kept.
  """

  def __init__(
    self,
    lengths: Int[np.ndarray, "documents"],
    sequence_length: int,
    seed: Seed | None = None,
    limit: int | None = None,
  ):
    self._sizes = np.asarray(lengths, np.int64) + 1
    self._sequence_length = sequence_length
    self._seed = seed
    self._limit = min(limit or sequence_length, sequence_length)
    self.num_positions = int(self._sizes.sum())
    self.rows_per_epoch = -(-self.num_positions // sequence_length)
    self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)

  def spans(self, epoch: int, row: int) -> list[Span]:
    order, starts, rows = self._epoch(epoch if self._seed is not None else 0)
    low = int(rows[row]) * self._sequence_length
    high = min(low + self._sequence_length, self.num_positions)
    first, last = np.searchsorted(starts, (low, high - 1), "right").tolist()
    edges = starts[first - 1 : last + 1].tolist()
    spans = []
    for document, start, stop in zip(order[first - 1 : last].tolist(), edges[:-1], edges[1:], strict=True):
      begin, end = max(low, start) - start, min(high, stop) - start
      spans += [Span(document, cut, min(cut + self._limit, end)) for cut in range(begin, end, self._limit)]
    return spans

  def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the order of the documents, where each starts, and the order of the rows."""
    order, rows = np.arange(len(self._sizes)), np.arange(self.rows_per_epoch)
    if self._seed is not None:
      random = generator(self._seed, epoch)
      order, rows = random.permutation(order), random.permutation(rows)
    return order, np.concatenate(([0], np.cumsum(self._sizes[order]))), rows


class BestFit:
  """Documents cut only where they are longer than a row, or than `limit`, and fitted together into rows.

  Pieces go into rows by best-fit decreasing, so that little padding is left. With a seed, what meets in a row is drawn
  once and the order of the rows anew each epoch; without one, rows are in the order of their first documents. Inside a
  row documents are in order.

  Takes 16 bytes for each document, 8 for each piece and 24 for each row.
  """

  def __init__(
    self,
    lengths: Int[np.ndarray, "documents"],
    sequence_length: int,
    seed: Seed | None = None,
    limit: int | None = None,
  ):
    self._sizes = np.asarray(lengths, np.int64) + 1
    self._seed = seed
    self._limit = min(limit or sequence_length, sequence_length)
    self._first_piece = np.concatenate(([0], np.cumsum(-(-self._sizes // self._limit))))
    self._pieces, self._starts = self._pack(sequence_length)
    self.num_positions = int(self._sizes.sum())
    self.rows_per_epoch = len(self._starts) - 1
    self._rows = functools.lru_cache(maxsize=2)(self._order_rows)

  def spans(self, epoch: int, row: int) -> list[Span]:
    number = self._rows(epoch if self._seed is not None else 0)[row]
    pieces = self._pieces[self._starts[number] : self._starts[number + 1]]
    documents = np.searchsorted(self._first_piece, pieces, "right") - 1
    starts = (pieces - self._first_piece[documents]) * self._limit
    stops = np.minimum(starts + self._limit, self._sizes[documents])
    return [Span(*span) for span in zip(documents.tolist(), starts.tolist(), stops.tolist(), strict=True)]

  def _pack(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pieces of all documents in the order of the rows that hold them, and where each row starts."""
    sizes = np.full(self._first_piece[-1], self._limit)
    last_pieces = self._first_piece[1:] - 1
    sizes[last_pieces] = self._sizes - (last_pieces - self._first_piece[:-1]) * self._limit
    order = np.arange(len(sizes)) if self._seed is None else generator(self._seed).permutation(len(sizes))
    rows = np.empty_like(order)
    rows[order] = best_fit_decreasing(sizes[order], capacity)
    return np.argsort(rows, kind="stable"), np.concatenate(([0], np.cumsum(np.bincount(rows))))

  def _order_rows(self, epoch: int) -> np.ndarray:
    if self._seed is None:
      return np.argsort(self._pieces[self._starts[:-1]])
    return generator(self._seed, epoch).permutation(self.rows_per_epoch)


PACKINGS: dict[str, Callable[..., Packing]] = {"split": Split, "best_fit": BestFit}


def make_row(
  spans: Sequence[Span], read: Callable[[int], Example], sequence_length: int, bos_id: int, eos_id: int
) -> Row:
  """Returns the row that spans fill, reading the documents in it."""
  row = empty_row(sequence_length)
  begins, heads, end, open_document = [], [], 0, -1
  for document, start, stop in spans:
    if document != open_document:
      (tokens, is_learned), open_document = read(document), document
    begin, end = end, end + stop - start
    begins.append(begin)
    heads.append(tokens[start - 1] if start else bos_id)
    known = min(stop, len(tokens))  # of positions; the one behind them predicts EOS
    row.targets[begin : begin + known - start] = tokens[start:known]
    row.weights[begin : begin + known - start] = is_learned[start:known]
    if known < stop:
      row.targets[end - 1] = eos_id
      row.weights[end - 1] = is_learned.any() if known else 1.0
  sizes = np.diff([*begins, end])
  row.tokens[1:end] = row.targets[: end - 1]
  row.tokens[begins] = heads
  row.segment_ids[:end] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
  row.positions[:end] = np.arange(end) - np.repeat(begins, sizes)
  return row


def empty_row(sequence_length: int) -> Row:
  """Returns a row of padding."""
  return Row(*(np.zeros(sequence_length, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))


def generator(seed: Seed, *numbers: int) -> np.random.Generator:
  """Returns the random numbers of a seed that these numbers name."""
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=numbers)))
