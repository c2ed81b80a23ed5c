"""Batches of packed rows. The batch of a step depends on the sources, the settings, the seed and the step alone.

Letters: B batch, T row length.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from ultrathink_jax.config import Config
from ultrathink_jax.data.mixture import Mixture, WeightStages, require_first_steps
from ultrathink_jax.data.packing import PACKINGS, Packing, Row, Span, Split, TokenSource, empty_row, make_row
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.errors import ConfigError, DataError
from ultrathink_jax.types import Batch, Context

_PREFETCH_BATCHES = 4
_NUM_THREADS = 2

LimitStages = Sequence[tuple[int, int]]


class _Rows:
  """The rows of a run without end: the mixture names a source, and each source is gone through epoch after epoch.

  `packings` are those of every source, for each of the stages that begin at `first_rows`; with a stage the epochs of
  every source begin anew.
  """

  def __init__(
    self,
    sources: Sequence[TokenSource],
    tokenizer: Tokenizer,
    sequence_length: int,
    mixture: Mixture,
    first_rows: Sequence[int],
    packings: Sequence[Sequence[Packing]],
  ):
    self._sources = sources
    self._tokenizer = tokenizer
    self._sequence_length = sequence_length
    self._mixture = mixture
    self._first_rows = first_rows
    self._given_before = [mixture.given_before(row) for row in first_rows]
    self._packings = packings

  def __getitem__(self, row: int) -> Row:
    source, spans = self.spans(row)
    tokenizer = self._tokenizer
    return make_row(spans, source.example, self._sequence_length, tokenizer.bos_id, tokenizer.eos_id)

  def spans(self, row: int) -> tuple[TokenSource, Sequence[Span]]:
    """Returns where the text of a row is from."""
    source, number = self._mixture.locate(row)
    stage = bisect_right(self._first_rows, row) - 1
    packing = self._packings[stage][source]
    spans = packing.spans(*divmod(number - self._given_before[stage][source], packing.rows_per_epoch))
    return self._sources[source], spans


class _Share:
  """Of each `batch_size` rows that follow one another, those at some positions: a random access source for Grain."""

  def __init__(self, rows: _Rows, batch_size: int, positions: Sequence[int]):
    self._rows = rows
    self._batch_size = batch_size
    self._positions = positions

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Row:
    step, number = divmod(int(index), len(self._positions))
    return self._rows[step * self._batch_size + int(self._positions[number])]


class Loader:
  """Training batches without end.

  A source is gone through in epochs; an epoch holds every position of every document once. Where a stage of
  `limits_by_stage` begins, the epochs of every source begin anew: the unfinished ones are left, and what they held may
  come again.
  """

  def __init__(
    self,
    sources: Sequence[TokenSource],
    tokenizer: Tokenizer,
    batch_size: int,
    sequence_length: int,
    seed: int | None,
    share: Sequence[int] | None = None,
    packing: str = "split",
    weights_by_stage: WeightStages = ((0, (1.0,)),),
    limits_by_stage: LimitStages | None = None,
  ):
    """Lays out the rows.

    Args:
      seed: None leaves documents, and rows of a source, in order.
      share: the rows of every batch to read, all by default: those that the devices of this process hold.
      packing: a key of PACKINGS.
      weights_by_stage: see Mixture.
      limits_by_stage: the step at which each stage begins and into spans of how many positions documents are cut from
        then on; before the first one, into spans that fill rows. Rows stay `sequence_length` long.

    Raises:
      ConfigError: stages or weights do not fit together.
      DataError: a source that takes part has no documents.
    """
    limits = list(limits_by_stage or ())
    if not limits or limits[0][0]:
      limits.insert(0, (0, sequence_length))
    mixture = Mixture(weights_by_stage, batch_size, seed)
    _require_documents(sources, weights_by_stage)
    _require_limits(limits)
    packings = [
      [
        PACKINGS[packing](source.lengths, sequence_length, None if seed is None else (seed, number, stage), limit)
        for number, source in enumerate(sources)
      ]
      for stage, (_, limit) in enumerate(limits)
    ]
    self._mixture = mixture
    self._batch_size = batch_size
    self._share_size = batch_size if share is None else len(share)
    rows = _Rows(sources, tokenizer, sequence_length, mixture, [step * batch_size for step, _ in limits], packings)
    self._all_rows = rows
    self._rows = _Share(rows, batch_size, range(batch_size) if share is None else share)
    weights = weights_by_stage[0][1]
    self.rows_per_epoch = sum(packing.rows_per_epoch for packing, w in zip(packings[0], weights, strict=True) if w)

  def batch(self, step: int) -> Batch:
    """Returns the batch of a step, [B, T]: rows step * B to (step + 1) * B of the run, or the share of them."""
    return _stack([self._rows[step * self._share_size + i] for i in range(self._share_size)])

  def sources(self, step: int) -> Int[np.ndarray, "B"]:
    """Returns the number of the source of each row of a step's batch, whatever the share."""
    first = step * self._batch_size
    return np.array([self._mixture.locate(row)[0] for row in range(first, first + self._batch_size)])

  def documents(self, step: int) -> dict[str, list[int]]:
    """Returns the numbers of the documents that a step's batch has text of, by the name of their source."""
    numbers: dict[str, set[int]] = {}
    for row in range(step * self._batch_size, (step + 1) * self._batch_size):
      source, spans = self._all_rows.spans(row)
      numbers.setdefault(source.name, set()).update(int(span.document) for span in spans)
    return {name: sorted(found) for name, found in numbers.items()}

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


def training_loader(config: Config, data: PreparedData, share: Sequence[int] | None = None) -> Loader:
  """Returns the loader of a run; it reads the rows `share` of every batch, all by default."""
  return Loader(
    data.train,
    data.tokenizer,
    config.train.batch_size,
    config.train.sequence_length,
    config.train.seed if config.data.shuffle else None,
    share,
    packing=config.data.packing,
    weights_by_stage=config.data.weights_by_stage,
    limits_by_stage=config.data.positions_by_stage or None,
  )


def validation_batches(
  source: TokenSource,
  tokenizer: Tokenizer,
  batch_size: int,
  sequence_length: int,
  limit: int | None = None,
  share: Sequence[int] | None = None,
) -> Iterator[Batch]:
  """Yields a split in order, every target once, at most `limit` batches; the last one is filled up with padding.

  `share` are the rows of every batch to read, all by default.
  """
  packing = Split(source.lengths, sequence_length)
  num_batches = -(-packing.rows_per_epoch // batch_size)
  share = range(batch_size) if share is None else share

  def read(row: int) -> Row:
    if row >= packing.rows_per_epoch:
      return empty_row(sequence_length)
    return make_row(packing.spans(0, row), source.example, sequence_length, tokenizer.bos_id, tokenizer.eos_id)

  for number in range(num_batches if limit is None else min(limit, num_batches)):
    yield _stack([read(number * batch_size + int(position)) for position in share])


def _require_documents(sources: Sequence[TokenSource], weights_by_stage: WeightStages) -> None:
  num_weights = len(weights_by_stage[0][1])
  if len(sources) != num_weights:
    raise ConfigError(f"data.mixture has {num_weights} weights for {len(sources)} sources; give one for each source")
  for number, source in enumerate(sources):
    if not len(source.lengths) and any(weights[number] for _, weights in weights_by_stage):
      raise DataError(f"data source {source.name!r} has no training documents; give more text, or leave it out")


def _require_limits(limits: LimitStages) -> None:
  require_first_steps("data.length_stages", limits)
  for step, limit in limits:
    if limit < 1:
      raise ConfigError(f"data.length_stages at step {step} cuts documents to {limit} positions; choose 1 or more")


def _stack(rows: Sequence[Row]) -> Batch:
  stacked = Row(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
  return Batch(
    tokens=stacked.tokens,
    targets=stacked.targets,
    weights=stacked.weights,
    context=Context(positions=stacked.positions, segment_ids=stacked.segment_ids),
  )
