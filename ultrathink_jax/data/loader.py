"""Batches of packed rows. The batch of a step depends on the store, the seed and the step alone.

Letters: B batch, T row length.
"""

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from ultrathink_jax.data.packing import Packing, Row, empty_row
from ultrathink_jax.data.token_store import TokenStore
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.errors import DataError
from ultrathink_jax.types import Batch, Context

_PREFETCH_BATCHES = 4
_NUM_THREADS = 2


class _Rows:
  """Every row of a run, epoch after epoch: a random access source for Grain, without end."""

  def __init__(self, packing: Packing, store: TokenStore, tokenizer: Tokenizer):
    self._packing = packing
    self._store = store
    self._tokenizer = tokenizer

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Row:
    epoch, row = divmod(int(index), self._packing.rows_per_epoch)
    tokenizer = self._tokenizer
    return self._packing.row(epoch, row, self._store.__getitem__, tokenizer.bos_id, tokenizer.eos_id)


class Loader:
  """Training batches, epoch after epoch without end."""

  def __init__(self, store: TokenStore, tokenizer: Tokenizer, batch_size: int, sequence_length: int, seed: int):
    if not len(store):
      raise DataError(f"data.source={store.info.source!r} has no training documents; give more text")
    packing = Packing(store.lengths, sequence_length, seed)
    self.rows_per_epoch = packing.rows_per_epoch
    self._batch_size = batch_size
    self._rows = _Rows(packing, store, tokenizer)

  def batch(self, step: int) -> Batch:
    """Returns the batch of a step, [B, T]: rows step * B to (step + 1) * B of the run."""
    first = step * self._batch_size
    return _stack([self._rows[first + i] for i in range(self._batch_size)])

  def batches(self, start_step: int = 0) -> Iterator[Batch]:
    """Yields the batches from `start_step` on, made ahead of time by threads that end when the iterator is closed."""
    import grain

    dataset = grain.MapDataset.source(self._rows).batch(self._batch_size, drop_remainder=True, batch_fn=_stack)
    options = grain.ReadOptions(num_threads=_NUM_THREADS, prefetch_buffer_size=_PREFETCH_BATCHES)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
      iterator.set_state({"next_index": start_step})
      yield from iterator
    finally:
      iterator.close()


def validation_batches(
  store: TokenStore, tokenizer: Tokenizer, batch_size: int, sequence_length: int, limit: int | None = None
) -> Iterator[Batch]:
  """Yields the split in order, every target once, at most `limit` batches; the last one is filled up with padding."""
  packing = Packing(store.lengths, sequence_length, seed=None)
  source = _Rows(packing, store, tokenizer)
  num_batches = -(-packing.rows_per_epoch // batch_size)
  for number in range(num_batches if limit is None else min(limit, num_batches)):
    rows = range(number * batch_size, min((number + 1) * batch_size, packing.rows_per_epoch))
    filled = [source[row] for row in rows]
    yield _stack(filled + [empty_row(sequence_length)] * (batch_size - len(filled)))


def _stack(rows: Sequence[Row]) -> Batch:
  stacked = Row(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
  return Batch(
    tokens=stacked.tokens,
    targets=stacked.targets,
    weights=stacked.weights,
    context=Context(positions=stacked.positions, segment_ids=stacked.segment_ids),
  )
