"""Best-fit decreasing by ranges of bins fills bins as the textbook's does, item by item."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_jax.data.best_fit import best_fit_decreasing


def item_by_item(sizes, capacity):
  """The oracle: what is left of each bin."""
  rooms = []
  for size in sorted(sizes, reverse=True):
    fitting = [bin for bin, room in enumerate(rooms) if room >= size]
    if fitting:
      rooms[min(fitting, key=rooms.__getitem__)] -= size
    else:
      rooms.append(capacity - size)
  return rooms


def rooms_left(sizes, bins, capacity):
  return capacity - np.bincount(bins, weights=sizes).astype(np.int64)


@given(
  st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=60), st.just(capacity))
  )
)
def test_bins_are_filled_as_by_the_oracle(sizes_and_capacity):
  sizes, capacity = sizes_and_capacity
  left = rooms_left(sizes, best_fit_decreasing(np.array(sizes), capacity), capacity)
  assert sorted(left) == sorted(item_by_item(sizes, capacity))


@pytest.mark.parametrize("capacity", [64, 1000])
def test_many_bins_are_filled_as_by_the_oracle(capacity):
  sizes = np.random.default_rng(capacity).lognormal(3, 1.2, 2000).astype(np.int64).clip(1, capacity)
  left = rooms_left(sizes, best_fit_decreasing(sizes, capacity), capacity)
  assert sorted(left) == sorted(item_by_item(sizes.tolist(), capacity))


def test_bins_are_counted_from_0_and_items_of_one_size_keep_their_order():
  assert best_fit_decreasing(np.array([2, 5, 2, 3, 2]), 5).tolist() == [1, 0, 2, 1, 2]


def test_no_items_take_no_bins():
  assert len(best_fit_decreasing(np.zeros(0, np.int64), 8)) == 0
