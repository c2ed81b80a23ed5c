import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_jax.evaluate.windows import Scored, rows, sum_by_owner, windows


@given(st.integers(1, 200), st.integers(1, 40))
def test_every_target_is_scored_once_with_half_a_window_of_context_or_all_there_is(num_inputs, size):
  scored = []
  for window in windows(0, num_inputs, size):
    assert 0 <= window.start <= window.first < window.stop <= num_inputs
    assert window.stop - window.start == min(size, num_inputs)
    assert window.first - window.start >= size // 2 or window.start == 0
    scored += range(window.first, window.stop)
  assert scored == list(range(num_inputs))


def sequences(*lengths):
  return [
    Scored(np.arange(length, dtype=np.int32) + 1000 * number, np.arange(length) > 0)
    for number, length in enumerate(lengths)
  ]


@given(st.lists(st.integers(2, 150), min_size=1, max_size=12), st.integers(2, 50), st.integers(1, 4))
def test_rows_hold_every_target_once_after_the_token_before_it(lengths, size, batch_size):
  seen = []
  for batch, owners in rows(sequences(*lengths), size, batch_size):
    assert batch.tokens.shape == owners.shape
    assert len(batch.tokens) <= batch_size
    np.testing.assert_array_equal(batch.weights > 0, owners >= 0)
    counts = owners >= 0
    np.testing.assert_array_equal(batch.targets[counts], batch.tokens[counts] + 1)
    np.testing.assert_array_equal(batch.targets[counts] // 1000, owners[counts])
    assert (batch.context.segment_ids[counts] > 0).all()
    seen += batch.targets[counts].tolist()
  assert sorted(seen) == [1000 * n + i for n, length in enumerate(lengths) for i in range(1, length)]


def test_short_sequences_share_a_row_and_have_positions_and_segments_of_their_own():
  [(batch, _)] = rows(sequences(20, 30), 64, 8)
  assert batch.tokens.shape == (1, 64)
  np.testing.assert_array_equal(batch.context.positions[0], [*range(19), *range(29), *[0] * 16])
  np.testing.assert_array_equal(batch.context.segment_ids[0], [1] * 19 + [2] * 29 + [0] * 16)


def test_windows_in_which_nothing_counts_are_not_read():
  sequence = sequences(101)[0]
  late = sequence._replace(counts=np.arange(101) > 95)
  assert sum(len(batch.tokens) for batch, _ in rows([late], 20, 1)) == 1
  assert list(rows([sequence._replace(counts=np.zeros(101, bool))], 20, 1)) == []


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_values_are_summed_by_the_sequence_they_belong_to(dtype):
  owners, values = np.array([[0, -1, 2], [2, 2, -1]]), np.array([[1, 1, 0], [1, 1, 1]], dtype)
  np.testing.assert_array_equal(sum_by_owner(owners, values, 4), [1, 0, 2, 0])
