"""Rows equal the documents of an epoch laid end to end and cut."""

import numpy as np
import pytest

from ultrathink_jax.data.packing import Packing

BOS, EOS = 1, 2
LENGTHS = np.array([5, 0, 13, 1, 30, 7, 2, 0, 9, 4])
DOCUMENTS = [np.arange(n, dtype=np.int32) + 100 * (i + 1) for i, n in enumerate(LENGTHS)]
POSITIONS = int(LENGTHS.sum() + len(LENGTHS))


def rows(packing, epoch=0):
  return [packing.row(epoch, r, DOCUMENTS.__getitem__, BOS, EOS) for r in range(packing.rows_per_epoch)]


def laid_end_to_end(order):
  """The oracle: inputs, targets, document and place in it of each position, one after another."""
  table = []
  for document in order:
    ids = DOCUMENTS[document].tolist()
    table += [(*pair, document) for pair in zip([BOS, *ids], [*ids, EOS], strict=True)]
  return np.array(table)


def segments(documents):
  """The oracle: segment ids and positions of a row whose positions belong to the given documents."""
  ids, positions = [], []
  for i, document in enumerate(documents):
    is_new = i == 0 or document != documents[i - 1]
    ids.append(is_new + (ids[-1] if ids else 0))
    positions.append(0 if is_new else positions[-1] + 1)
  return ids, positions


@pytest.mark.parametrize("length", [1, 2, 7, 8, 16, 64, 81, 200])
def test_unshuffled_rows_equal_the_oracle(length):
  table = laid_end_to_end(range(len(LENGTHS)))
  packed = rows(Packing(LENGTHS, length, seed=None))
  assert len(packed) == -(-POSITIONS // length)
  for number, row in enumerate(packed):
    expected = table[number * length : (number + 1) * length]
    filled = len(expected)
    ids, positions = segments(expected[:, 2])
    np.testing.assert_array_equal(row.tokens[:filled], expected[:, 0])
    np.testing.assert_array_equal(row.targets[:filled], expected[:, 1])
    np.testing.assert_array_equal(row.segment_ids[:filled], ids)
    np.testing.assert_array_equal(row.positions[:filled], positions)
    np.testing.assert_array_equal(row.weights, np.arange(length) < filled)
    assert not row.segment_ids[filled:].any()


@pytest.mark.parametrize("length", [1, 7, 16, 80])
def test_shuffled_rows_equal_the_oracle_of_their_permutations(length):
  random = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, 5))))
  table = laid_end_to_end(random.permutation(len(LENGTHS)))
  packed = rows(Packing(LENGTHS, length, seed=3), epoch=5)
  assert len(packed) == POSITIONS // length
  for row, number in zip(packed, random.permutation(len(packed)), strict=True):
    expected = table[number * length : (number + 1) * length]
    np.testing.assert_array_equal(row.tokens, expected[:, 0])
    np.testing.assert_array_equal(row.targets, expected[:, 1])


def test_every_target_is_in_an_epoch_once():
  packed = rows(Packing(LENGTHS, 3, seed=0), epoch=2)
  assert POSITIONS % 3 == 0
  targets = np.concatenate([row.targets for row in packed])
  expected = np.concatenate([*DOCUMENTS, np.full(len(DOCUMENTS), EOS)])
  np.testing.assert_array_equal(np.sort(targets), np.sort(expected))


def test_bos_is_never_a_target_and_eos_never_an_input():
  for row in rows(Packing(LENGTHS, 7, seed=1)):
    assert BOS not in row.targets
    assert EOS not in row.tokens


def test_epochs_differ_and_repeat_exactly():
  first, again, other = (Packing(LENGTHS, 8, seed=0) for _ in range(3))
  assert [first.spans(0, r) for r in range(4)] != [first.spans(1, r) for r in range(4)]
  assert [again.spans(1, r) for r in range(4)] == [first.spans(1, r) for r in range(4)]
  assert [other.spans(9, 3), other.spans(1, 3), other.spans(0, 0)][1] == first.spans(1, 3)


def test_seeds_give_other_permutations():
  assert Packing(LENGTHS, 80, seed=0).spans(0, 0) != Packing(LENGTHS, 80, seed=1).spans(0, 0)


def test_an_epoch_shorter_than_a_row_is_one_padded_row():
  (row,) = rows(Packing(LENGTHS, 100, seed=0))
  assert row.weights.sum() == POSITIONS


def test_the_ragged_end_of_a_training_epoch_is_left_out():
  assert all(row.weights.all() for row in rows(Packing(LENGTHS, 16, seed=0)))


def test_no_documents_give_no_rows():
  assert Packing(np.zeros(0, np.int64), 16, seed=None).rows_per_epoch == 0
