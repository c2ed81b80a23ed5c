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
  """The rows of a run, epoch after epoch: a random access source for Grain, without end.

  Of each `batch_size` rows that follow one another only `share`, positions in the batch, are there.
  """

  def __init__(self, packing: Packing, store: TokenStore, tokenizer: Tokenizer, batch_size: int, share: Sequence[int]):
    self._packing = packing
    self._store = store
    self._tokenizer = tokenizer
    self._batch_size = batch_size
    self._share = share

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Row:
    step, position = divmod(int(index), len(self._share))
    epoch, row = divmod(step * self._batch_size + int(self._share[position]), self._packing.rows_per_epoch)
    tokenizer = self._tokenizer
    return self._packing.row(epoch, row, self._store.__getitem__, tokenizer.bos_id, tokenizer.eos_id)


class Loader:
  """Training batches, epoch after epoch without end.

  `share` are the rows of every batch to read, all by default: those that the devices of this process hold.
  """

  def __init__(
    self,
    store: TokenStore,
    tokenizer: Tokenizer,
    batch_size: int,
    sequence_length: int,
    seed: int,
    share: Sequence[int] | None = None,
  ):
    if not len(store):
      raise DataError(f"data.source={store.info.source!r} has no training documents; give more text")
    packing = Packing(store.lengths, sequence_length, seed)
    self.rows_per_epoch = packing.rows_per_epoch
    share = range(batch_size) if share is None else share
    self._share_size = len(share)
    self._rows = _Rows(packing, store, tokenizer, batch_size, share)

  def batch(self, step: int) -> Batch:
    """Returns the batch of a step, [B, T]: rows step * B to (step + 1) * B of the run, or the share of them."""
    return _stack([self._rows[step * self._share_size + i] for i in range(self._share_size)])

  def batches(self, start_step: int = 0) -> Iterator[Batch]:
    """Yields the batches from `start_step` on, made ahead of time by threads that end when the iterator is closed."""
    import grain

    dataset = grain.MapDataset.source(self._rows).batch(self._share_size, drop_remainder=True, batch_fn=_stack)
    options = grain.ReadOptions(num_threads=_NUM_THREADS, prefetch_buffer_size=_PREFETCH_BATCHES)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
      iterator.set_state({"next_index": start_step})
      yield from iterator
    finally:
      iterator.close()


def validation_batches(
  store: TokenStore,
  tokenizer: Tokenizer,
  batch_size: int,
  sequence_length: int,
  limit: int | None = None,
  share: Sequence[int] | None = None,
) -> Iterator[Batch]:
  """Yields the split in order, every target once, at most `limit` batches; the last one is filled up with padding.

  `share` are the rows of every batch to read, all by default.
  """
  packing = Packing(store.lengths, sequence_length, seed=None)
  source = _Rows(packing, store, tokenizer, 1, (0,))
  num_batches = -(-packing.rows_per_epoch // batch_size)
  share = range(batch_size) if share is None else share
  for number in range(num_batches if limit is None else min(limit, num_batches)):
    rows = (number * batch_size + int(position) for position in share)
    yield _stack([source[row] if row < packing.rows_per_epoch else empty_row(sequence_length) for row in rows])


def _stack(rows: Sequence[Row]) -> Batch:
  stacked = Row(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
  return Batch(
    tokens=stacked.tokens,
    targets=stacked.targets,
    weights=stacked.weights,
    context=Context(positions=stacked.positions, segment_ids=stacked.segment_ids),
  )
