"""Rows hold every position of every document once an epoch, each document by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_jax.data.packing import PACKINGS, BestFit, Example, Span, Split, make_row

BOS, EOS = 1, 2
LENGTHS = np.array([5, 0, 13, 1, 30, 7, 2, 0, 9, 4])
DOCUMENTS = [
  Example(np.arange(n, dtype=np.int32) + 100 * (i + 1), (np.arange(n) + i) % 3 > 0) for i, n in enumerate(LENGTHS)
]
POSITIONS = int(LENGTHS.sum() + len(LENGTHS))

lengths = st.lists(st.integers(0, 40), max_size=30).map(lambda values: np.array(values, np.int64))
seeds = st.one_of(st.none(), st.integers(0, 9), st.tuples(st.integers(0, 3), st.integers(0, 3)))
kinds = st.sampled_from(sorted(PACKINGS))
limits = st.one_of(st.none(), st.integers(1, 60))


def spans(packing, epoch=0):
  return [packing.spans(epoch, row) for row in range(packing.rows_per_epoch)]


def rows(packing, sequence_length, epoch=0):
  return [make_row(row, DOCUMENTS.__getitem__, sequence_length, BOS, EOS) for row in spans(packing, epoch)]


def laid_end_to_end(order):
  """The oracle: input, target, weight, document and place in it of each position, one after another."""
  table = []
  for document in order:
    ids, is_learned = (array.tolist() for array in DOCUMENTS[document])
    weights = [*is_learned, any(is_learned) if ids else True]
    table += zip([BOS, *ids], [*ids, EOS], weights, [document] * len(weights), range(len(weights)), strict=True)
  return np.array(table)


def segments(documents):
  """The oracle: segment ids and positions of a row whose positions belong to the given documents."""
  ids, positions = [], []
  for i, document in enumerate(documents):
    is_new = i == 0 or document != documents[i - 1]
    ids.append(is_new + (ids[-1] if ids else 0))
    positions.append(0 if is_new else positions[-1] + 1)
  return ids, positions


def assert_row_holds(row, expected):
  """A row equals this stretch of a table, and the rest of it is padding."""
  filled = len(expected)
  ids, positions = segments(expected[:, 3])
  for array, values in zip(row, (expected[:, 0], expected[:, 1], expected[:, 2], ids, positions), strict=True):
    np.testing.assert_array_equal(array[:filled], values)
    assert not array[filled:].any()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 16, 64, 81, 200])
def test_unshuffled_split_rows_equal_the_oracle(length):
  table = laid_end_to_end(range(len(LENGTHS)))
  packed = rows(Split(LENGTHS, length), length)
  assert len(packed) == -(-POSITIONS // length)
  for number, row in enumerate(packed):
    assert_row_holds(row, table[number * length : (number + 1) * length])


@pytest.mark.parametrize("length", [1, 7, 16, 80])
def test_shuffled_split_rows_equal_the_oracle_of_their_permutations(length):
  random = np.random.Generator(np.random.Philox(np.random.SeedSequence(3, spawn_key=(5,))))
  table = laid_end_to_end(random.permutation(len(LENGTHS)))
  packed = rows(Split(LENGTHS, length, seed=3), length, epoch=5)
  for row, number in zip(packed, random.permutation(-(-POSITIONS // length)), strict=True):
    assert_row_holds(row, table[number * length : (number + 1) * length])


@given(kinds, lengths, st.integers(1, 50), seeds, limits, st.integers(0, 5))
def test_every_position_of_every_document_is_in_an_epoch_once(kind, lengths, sequence_length, seed, limit, epoch):
  packing = PACKINGS[kind](lengths, sequence_length, seed, limit)
  held = [(span.document, place) for row in spans(packing, epoch) for span in row for place in range(*span[1:])]
  expected = [(document, place) for document, length in enumerate(lengths) for place in range(length + 1)]
  assert sorted(held) == expected
  assert packing.num_positions == len(expected)


@given(kinds, lengths, st.integers(1, 50), seeds, limits)
def test_rows_are_not_overfull_nor_empty_and_spans_within_the_limit(kind, lengths, sequence_length, seed, limit):
  for row in spans(PACKINGS[kind](lengths, sequence_length, seed, limit)):
    sizes = [stop - start for _, start, stop in row]
    assert 0 < sum(sizes) <= sequence_length
    assert all(0 < size <= (limit or sequence_length) for size in sizes)


@given(lengths, st.integers(1, 50), seeds, st.integers(0, 3))
def test_split_fills_all_rows_but_one(lengths, sequence_length, seed, epoch):
  packed = spans(Split(lengths, sequence_length, seed), epoch)
  sizes = [sum(stop - start for _, start, stop in row) for row in packed]
  assert sum(size < sequence_length for size in sizes) <= 1


@given(lengths, st.integers(1, 50), seeds, st.integers(0, 3))
def test_a_limit_cuts_what_split_rows_hold_and_moves_nothing(lengths, sequence_length, seed, epoch):
  whole, cut = (spans(Split(lengths, sequence_length, seed, limit), epoch) for limit in (None, 7))
  places = lambda row: [(span.document, place) for span in row for place in range(*span[1:])]
  assert [places(row) for row in cut] == [places(row) for row in whole]


@given(lengths, st.integers(1, 50), seeds, limits)
def test_best_fit_cuts_only_documents_that_are_longer_than_a_row_or_the_limit(lengths, sequence_length, seed, limit):
  most = min(sequence_length, limit or sequence_length)
  held = sorted(span for row in spans(BestFit(lengths, sequence_length, seed, limit)) for span in row)
  assert held == [
    Span(document, start, min(start + most, length + 1))
    for document, length in enumerate(lengths)
    for start in range(0, length + 1, most)
  ]


@given(lengths, st.integers(1, 50), seeds)
def test_no_two_rows_of_best_fit_fit_into_one(lengths, sequence_length, seed):
  sizes = sorted(sum(stop - start for _, start, stop in row) for row in spans(BestFit(lengths, sequence_length, seed)))
  assert len(sizes) < 2 or sizes[0] + sizes[1] > sequence_length


def test_best_fit_pads_less_than_a_hundredth_of_documents_like_those_of_the_web():
  lengths = np.random.default_rng(0).lognormal(5.5, 1.1, 20_000).astype(np.int64)
  packing = BestFit(lengths, 1024, seed=0)
  assert packing.num_positions > 0.99 * packing.rows_per_epoch * 1024


def test_best_fit_without_a_seed_is_in_order():
  packed = spans(BestFit(LENGTHS, 32))
  assert all(row == sorted(row) for row in packed)
  assert packed == sorted(packed)


def test_best_fit_keeps_its_rows_and_changes_their_order_each_epoch():
  packing = BestFit(np.tile(LENGTHS, 5), 32, seed=0)
  first, second = spans(packing, 0), spans(packing, 1)
  assert first != second
  assert sorted(first) == sorted(second)


@given(kinds, lengths.filter(len), st.integers(1, 50), seeds, limits, st.integers(0))
def test_segments_hold_one_document_each_and_count_from_0(kind, lengths, sequence_length, seed, limit, row):
  packing = PACKINGS[kind](lengths, sequence_length, seed, limit)
  row_spans = packing.spans(0, row % packing.rows_per_epoch)
  documents = [Example(np.arange(n, dtype=np.int32) + 100 * (i + 1), np.ones(n, bool)) for i, n in enumerate(lengths)]
  row = make_row(row_spans, documents.__getitem__, sequence_length, BOS, EOS)
  assert row.segment_ids.max() == len(row_spans)
  for segment, (document, start, stop) in enumerate(row_spans, 1):
    (here,) = np.nonzero(row.segment_ids == segment)
    ids = documents[document].tokens.tolist()
    assert here.tolist() == list(range(here[0], here[0] + stop - start))
    assert row.positions[here].tolist() == list(range(stop - start))
    assert row.tokens[here].tolist() == [BOS, *ids][start:stop]
    assert row.targets[here].tolist() == [*ids, EOS][start:stop]


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_weights_go_with_targets(kind):
  is_learned = {int(token): weight for example in DOCUMENTS for token, weight in zip(*example, strict=True)}
  learned_ends = sum(bool(example.is_learned.any()) if len(example.tokens) else True for example in DOCUMENTS)
  packed = rows(PACKINGS[kind](LENGTHS, 16, 0), 16)
  targets, weights = (np.concatenate([getattr(row, name) for row in packed]) for name in ("targets", "weights"))
  for target, weight in zip(targets.tolist(), weights.tolist(), strict=True):
    if target >= 100:
      assert weight == is_learned[target]
  assert weights[targets == EOS].sum() == learned_ends


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_bos_is_never_a_target_and_eos_never_an_input(kind):
  for row in rows(PACKINGS[kind](LENGTHS, 7, 1), 7):
    assert BOS not in row.targets
    assert EOS not in row.tokens


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_epochs_differ_and_repeat_exactly(kind):
  first, again = (PACKINGS[kind](LENGTHS, 8, 0) for _ in range(2))
  assert spans(first, 0) != spans(first, 1)
  assert spans(again, 9) != spans(again, 1)
  assert spans(again, 1) == spans(first, 1)


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_seeds_give_other_permutations(kind):
  assert spans(PACKINGS[kind](LENGTHS, 8, 0)) != spans(PACKINGS[kind](LENGTHS, 8, (0, 1)))


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_an_epoch_shorter_than_a_row_is_one_padded_row(kind):
  (row,) = rows(PACKINGS[kind](LENGTHS, 100, 0), 100)
  assert np.count_nonzero(row.segment_ids) == POSITIONS


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_no_documents_give_no_rows(kind):
  assert PACKINGS[kind](np.zeros(0, np.int64), 16).rows_per_epoch == 0
