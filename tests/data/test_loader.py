"""The batch of a step depends on the step alone, whichever way it is reached."""

import threading
import time

import jax
import numpy as np
import pytest

from ultrathink_jax.data import Loader, validation_batches


def assert_equal(batch, other):
  for array, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(array, expected)


@pytest.fixture(scope="module")
def loader(prepared):
  return Loader(prepared.train, prepared.tokenizer, batch_size=4, sequence_length=64, seed=0)


@pytest.mark.parametrize("start", [0, 1, 7, 1000])
def test_batches_from_any_step_are_the_batches_of_the_steps(loader, start):
  batches = loader.batches(start)
  for step in range(start, start + 6):
    assert_equal(next(batches), loader.batch(step))
  batches.close()


def test_a_batch_does_not_depend_on_what_was_read_before(loader, prepared):
  fresh = Loader(prepared.train, prepared.tokenizer, batch_size=4, sequence_length=64, seed=0)
  for step in (500, 3, 77):
    loader.batch(step)
  assert_equal(fresh.batch(40), loader.batch(40))


def test_rows_go_on_in_the_next_batch_and_epoch(loader, prepared):
  wide = Loader(prepared.train, prepared.tokenizer, batch_size=8, sequence_length=64, seed=0)
  step = loader.rows_per_epoch // 8  # its batch crosses the end of the epoch
  expected = jax.tree.map(lambda a, b: np.concatenate([a, b]), loader.batch(2 * step), loader.batch(2 * step + 1))
  assert_equal(wide.batch(step), expected)


def test_shares_of_several_readers_make_the_whole_batch(loader, prepared):
  read = lambda share: Loader(prepared.train, prepared.tokenizer, 4, 64, 0, share)
  parts = [read(share) for share in ([0, 3], [1, 2])]
  for step in (0, 7, loader.rows_per_epoch // 4):  # the last one crosses the end of the epoch
    whole = loader.batch(step)
    for part, share in zip(parts, ([0, 3], [1, 2]), strict=True):
      expected = jax.tree.map(lambda array, share=share: array[share], whole)
      assert_equal(part.batch(step), expected)
      batches = part.batches(step)
      assert_equal(next(batches), expected)
      batches.close()


def test_shares_of_the_validation_split_make_the_whole(prepared):
  read = lambda share: list(validation_batches(prepared.validation, prepared.tokenizer, 3, 50, share=share))
  whole, first, rest = read(None), read([0]), read([1, 2])
  assert len(whole) == len(first) == len(rest)
  for batch, *parts in zip(whole, first, rest, strict=True):
    assert_equal(jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), batch)


def test_epochs_are_shuffled_anew(prepared):
  loader = Loader(prepared.train, prepared.tokenizer, batch_size=1, sequence_length=64, seed=0)
  assert not np.array_equal(loader.batch(0).tokens, loader.batch(loader.rows_per_epoch).tokens)


def test_a_batch_has_the_shapes_and_dtypes_of_the_step(loader):
  batch = loader.batch(0)
  assert {array.shape for array in jax.tree.leaves(batch)} == {(4, 64)}
  assert batch.tokens.dtype == batch.targets.dtype == np.int32
  assert batch.weights.dtype == np.float32


def test_closing_the_iterator_ends_its_threads(loader):
  batches = loader.batches()
  next(batches)
  batches.close()
  deadline = time.monotonic() + 10
  while any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate()):
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.mark.parametrize(("batch_size", "length"), [(3, 50), (1, 7), (64, 512)])
def test_validation_reads_every_target_once(prepared, batch_size, length):
  batches = list(validation_batches(prepared.validation, prepared.tokenizer, batch_size, length))
  assert {array.shape for batch in batches for array in jax.tree.leaves(batch)} == {(batch_size, length)}
  weights = np.concatenate([batch.weights.ravel() for batch in batches])
  targets = np.concatenate([batch.targets.ravel() for batch in batches])[weights > 0]
  eos = [prepared.tokenizer.eos_id]
  expected = [np.concatenate([prepared.validation[i], eos]) for i in range(len(prepared.validation))]
  np.testing.assert_array_equal(targets, np.concatenate(expected))


def test_padding_is_segment_zero(prepared):
  for batch in validation_batches(prepared.validation, prepared.tokenizer, 3, 50):
    np.testing.assert_array_equal(batch.context.segment_ids == 0, batch.weights == 0)


def test_a_limit_gives_the_first_validation_batches(prepared):
  everything = list(validation_batches(prepared.validation, prepared.tokenizer, 2, 16))
  limited = list(validation_batches(prepared.validation, prepared.tokenizer, 2, 16, limit=2))
  assert len(limited) == 2
  assert_equal(limited[1], everything[1])
