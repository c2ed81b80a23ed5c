"""The batch of a step depends on the step alone, whichever way it is reached."""

import collections
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from ultrathink_jax.data.loader import Loader, validation_batches
from ultrathink_jax.data.packing import PACKINGS, Example, Split, make_row
from ultrathink_jax.data.tokenizer import NumbersTokenizer
from ultrathink_jax.errors import ConfigError, DataError

LENGTH = 32
TOKENIZER = NumbersTokenizer(60_000)


class Documents:
  """A source in memory; every token of it is another number."""

  def __init__(self, name, num_documents, first_token, seed):
    self.name = name
    random = np.random.default_rng(seed)
    self.lengths = random.lognormal(2.5, 1.0, num_documents).astype(np.int64)
    self._ends = first_token + np.cumsum(self.lengths)

  def example(self, index):
    tokens = np.arange(self._ends[index] - self.lengths[index], self._ends[index], dtype=np.int32)
    return Example(tokens, tokens % 7 > 0)


CODE, BOOKS, EMPTY = Documents("code", 300, 1000, 0), Documents("books", 80, 20_000, 1), Documents("none", 0, 0, 2)
MIXED = {
  "packing": "best_fit",
  "weights_by_stage": ((0, (0.7, 0.3)), (90, (0.2, 0.8))),
  "limits_by_stage": ((0, 12), (60, LENGTH)),
}


def make_loader(share=None, batch_size=8, seed=0, sources=(CODE, BOOKS), **changes):
  return Loader(sources, TOKENIZER, batch_size, LENGTH, seed, share, **(MIXED | changes))


def assert_equal(batch, other):
  for array, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(array, expected)


def open_readers(num_readers, step=0):
  """Iterators that hold rows r, r + n, r + 2n .. of every batch each."""
  return [make_loader(range(first, 8, num_readers)).batches(step) for first in range(num_readers)]


def read_together(readers):
  """Returns the next batch of all readers, its rows in order again."""
  join = lambda *arrays: np.stack(arrays, axis=1).reshape(-1, LENGTH)
  return jax.tree.map(join, *[next(reader) for reader in readers])


def close(readers):
  for reader in readers:
    reader.close()


@pytest.fixture(scope="module")
def loader():
  return make_loader()


@pytest.fixture(scope="module")
def batches(loader):
  return [loader.batch(step) for step in range(201)]


@pytest.mark.parametrize("num_readers", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_readers(batches, num_readers):
  readers = open_readers(num_readers)
  for expected in batches:
    assert_equal(read_together(readers), expected)
  close(readers)


def test_batches_are_the_same_after_stops_and_with_another_number_of_readers_after_each(batches):
  random = np.random.default_rng(0)
  step = 0
  for stop in [*sorted(random.choice(np.arange(1, 201), 8, replace=False).tolist()), 201]:
    readers = open_readers(int(random.choice([1, 2, 4])), step)
    for expected in batches[step:stop]:
      assert_equal(read_together(readers), expected)
    close(readers)
    step = stop


def test_a_batch_does_not_depend_on_what_was_read_before(batches):
  loader = make_loader()
  for step in (150, 3, 77, 60, 59, 200):
    assert_equal(loader.batch(step), batches[step])


def test_shares_may_be_any_rows(batches):
  for share in ([0, 3], [7, 1, 2]):
    assert_equal(make_loader(share).batch(40), jax.tree.map(lambda array, share=share: array[share], batches[40]))


@pytest.mark.parametrize("start", [0, 7, 1000])
def test_read_ahead_begins_at_any_step(loader, start):
  ahead = loader.batches(start)
  for step in range(start, start + 6):
    assert_equal(next(ahead), loader.batch(step))
  ahead.close()


def test_rows_go_on_in_the_next_batch_and_epoch():
  loader, wide = (Loader([BOOKS], TOKENIZER, size, LENGTH, 0) for size in (4, 8))
  for step in range(2 * Split(BOOKS.lengths, LENGTH).rows_per_epoch // 8):
    expected = jax.tree.map(lambda a, b: np.concatenate([a, b]), loader.batch(2 * step), loader.batch(2 * step + 1))
    assert_equal(wide.batch(step), expected)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("packing", sorted(PACKINGS))
def test_every_row_is_the_next_of_its_source_since_the_limit_changed(packing, seed):
  loader = make_loader(packing=packing, seed=seed)
  for step in range(150):
    stage, limit = (0, 12) if step < 60 else (1, LENGTH)
    if step in (0, 60):
      keys = [None if seed is None else (seed, number, stage) for number in range(2)]
      parts = [PACKINGS[packing](s.lengths, LENGTH, key, limit) for s, key in zip((CODE, BOOKS), keys, strict=True)]
      numbers = [itertools.count() for _ in parts]
    batch = loader.batch(step)
    for row, source in enumerate(loader.sources(step).tolist()):
      spans = parts[source].spans(*divmod(next(numbers[source]), parts[source].rows_per_epoch))
      expected = make_row(spans, (CODE, BOOKS)[source].example, LENGTH, TOKENIZER.bos_id, TOKENIZER.eos_id)
      np.testing.assert_array_equal(batch.tokens[row], expected.tokens)
      np.testing.assert_array_equal(batch.context.positions[row], expected.positions)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("packing", sorted(PACKINGS))
def test_an_epoch_of_every_source_of_a_mixture_has_every_target_once(packing, seed):
  loader = make_loader(packing=packing, seed=seed, weights_by_stage=((0, (0.6, 0.4)),), limits_by_stage=((0, 20),))
  held = collections.defaultdict(list)  # the targets of each row of a source
  for step in range(100):
    batch = loader.batch(step)
    for row, source in enumerate(loader.sources(step).tolist()):
      held[source].append(batch.targets[row][batch.context.segment_ids[row] > 0])
  for number, source in enumerate((CODE, BOOKS)):
    num_rows = PACKINGS[packing](source.lengths, LENGTH, None, 20).rows_per_epoch
    tokens = [source.example(document).tokens for document in range(len(source.lengths))]
    expected = np.sort(np.concatenate([*tokens, np.full(len(tokens), TOKENIZER.eos_id)]))
    assert len(held[number]) >= 2 * num_rows
    for epoch in (held[number][:num_rows], held[number][num_rows : 2 * num_rows]):
      np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), expected)


def test_sources_of_a_batch_are_those_of_its_rows(loader, batches):
  for step in (0, 89, 90, 200):
    is_book = [(tokens > 19_999).any() for tokens in batches[step].tokens]
    assert loader.sources(step).tolist() == list(map(int, is_book))


def test_documents_of_a_batch_are_those_whose_tokens_it_has(loader, batches):
  for step in (0, 17, 95):
    batch, named = batches[step], loader.documents(step)
    tokens = set(batch.tokens[batch.context.segment_ids > 0].tolist()) - {TOKENIZER.bos_id, TOKENIZER.eos_id}
    held = {(name, number) for name, numbers in named.items() for number in numbers}
    sources = {"code": CODE, "books": BOOKS}
    everything = {
      (name, number) for name, source in sources.items() for number in range(len(source.lengths))
      if tokens & set(source.example(number).tokens.tolist())
    }  # fmt: skip
    assert everything <= held  # one of which a row has nothing but its end has no token here
    assert len(held) < len(everything) + 24


def test_an_epoch_is_the_rows_of_all_sources_that_take_part():
  both = make_loader(weights_by_stage=((0, (0.5, 0.5)),), limits_by_stage=None)
  one = make_loader(weights_by_stage=((0, (1.0, 0.0)),), limits_by_stage=None)
  assert one.rows_per_epoch == PACKINGS["best_fit"](CODE.lengths, LENGTH, (0, 0, 0), LENGTH).rows_per_epoch
  other = PACKINGS["best_fit"](BOOKS.lengths, LENGTH, (0, 1, 0), LENGTH).rows_per_epoch
  assert both.rows_per_epoch == one.rows_per_epoch + other


def test_tokens_that_are_not_learned_weigh_nothing(batches):
  for batch in batches[:20]:
    is_token = (batch.context.segment_ids > 0) & (batch.targets != TOKENIZER.eos_id)
    np.testing.assert_array_equal(batch.weights[is_token], batch.targets[is_token] % 7 > 0)


def test_limited_documents_are_short_in_rows_of_one_shape(batches):
  assert max(batch.context.positions.max() for batch in batches[:60]) == 11
  assert max(batch.context.positions.max() for batch in batches[60:]) == LENGTH - 1
  assert {array.shape for batch in batches for array in jax.tree.leaves(batch)} == {(8, LENGTH)}


def test_documents_are_not_limited_before_the_first_stage():
  loader = make_loader(limits_by_stage=((60, 12),))
  assert max(loader.batch(step).context.positions.max() for step in range(60)) == LENGTH - 1
  assert max(loader.batch(step).context.positions.max() for step in range(60, 80)) == 11


def test_a_batch_has_the_dtypes_of_the_step(batches):
  assert batches[0].tokens.dtype == batches[0].targets.dtype == np.int32
  assert batches[0].weights.dtype == np.float32


def test_closing_the_iterator_ends_its_threads(loader):
  ahead = loader.batches()
  next(ahead)
  ahead.close()
  deadline = time.monotonic() + 10
  while any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate()):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_batches_are_made_ahead_of_the_steps():
  documents = Documents("slow", 20, 1000, 0)
  read = documents.example
  documents.example = lambda index: (time.sleep(0.02), read(index))[1]
  ahead = Loader([documents], TOKENIZER, 4, LENGTH, 0).batches()
  waits = []
  for _ in range(4):
    begun = time.monotonic()
    next(ahead)
    waits.append(time.monotonic() - begun)
    time.sleep(0.3)
  ahead.close()
  assert waits[0] > 0.04
  assert min(waits[1:]) < 0.02


def test_a_source_without_documents_is_refused_where_it_takes_part():
  mixed = {"sources": (CODE, EMPTY), "weights_by_stage": ((0, (1.0, 0.0)), (5, (1.0, 1.0)))}
  with pytest.raises(DataError, match="data source 'none' has no training documents"):
    make_loader(**mixed)
  make_loader(**mixed | {"weights_by_stage": ((0, (1.0, 0.0)),)}).batch(3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sources": (CODE,)}, "data.mixture has 2 weights for 1 sources"),
    ({"limits_by_stage": ((0, 8), (5, 0))}, "data.length_stages at step 5 cuts documents to 0 positions"),
    ({"limits_by_stage": ((5, 8), (5, 9))}, r"data.length_stages begin at steps \(0, 5, 5\)"),
  ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    make_loader(**changes)


@pytest.mark.parametrize(("batch_size", "length"), [(3, 50), (1, 7), (64, 512)])
def test_validation_reads_every_target_once_and_in_order(batch_size, length):
  batches = list(validation_batches(BOOKS, TOKENIZER, batch_size, length))
  assert {array.shape for batch in batches for array in jax.tree.leaves(batch)} == {(batch_size, length)}
  targets = np.concatenate([batch.targets[batch.context.segment_ids > 0] for batch in batches])
  tokens = [BOOKS.example(document).tokens for document in range(len(BOOKS.lengths))]
  np.testing.assert_array_equal(targets, np.concatenate([part for ids in tokens for part in (ids, [TOKENIZER.eos_id])]))


def test_padding_of_the_validation_split_weighs_nothing():
  *_, last = validation_batches(BOOKS, TOKENIZER, 3, 50)
  assert not last.weights[last.context.segment_ids == 0].any()


def test_shares_of_the_validation_split_make_the_whole():
  read = lambda share: list(validation_batches(BOOKS, TOKENIZER, 3, 50, share=share))
  for batch, *parts in zip(read(None), read([0]), read([1, 2]), strict=True):
    assert_equal(jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), batch)


def test_a_limit_gives_the_first_validation_batches():
  everything = list(validation_batches(BOOKS, TOKENIZER, 2, 16))
  limited = list(validation_batches(BOOKS, TOKENIZER, 2, 16, limit=2))
  assert len(limited) == 2
  assert_equal(limited[1], everything[1])
