"""Rows are shared out exactly, and any row is found as if all before it had been counted."""

import collections
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ultrathink_jax.data.mixture import Mixture
from ultrathink_jax.errors import ConfigError

BLOCK = 1024
STAGES = ((0, (0.7, 0.2, 0.1, 0.0)), (450, (0.1, 0.0, 0.2, 0.7)), (451, (1.0, 1.0, 1.0, 0.0)), (1200, (3, 1, 4, 1)))


def counted(mixture, num_rows):
  """The oracle: locations found by counting every row from the first on."""
  given = collections.Counter()
  for row in range(num_rows):
    source, _ = mixture.locate(row)
    yield source, given[source]
    given[source] += 1


@pytest.mark.parametrize("seed", [None, 0])
def test_rows_of_a_source_are_consecutive_over_blocks_and_stages(seed):
  mixture = Mixture(STAGES, 8, seed)
  assert [mixture.locate(row) for row in range(16_000)] == list(counted(mixture, 16_000))


weight_stages = st.integers(1, 5).flatmap(
  lambda num_sources: st.lists(
    st.tuples(
      st.integers(1, 900),
      st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1.0)), min_size=num_sources, max_size=num_sources).filter(any),
    ),
    min_size=1,
    max_size=3,
  )
)


@example([(205, (10, 1, 10))], 5, 0)  # in one row more than a block, rounding would take back a row
@given(weight_stages, st.integers(1, 7), st.one_of(st.none(), st.integers(0, 3)))
def test_every_source_has_its_share_at_the_end_of_every_block_and_stage(durations, batch_size, seed):
  firsts = np.cumsum([0, *(steps for steps, _ in durations)]).tolist()
  stages = tuple((first, tuple(weights)) for first, (_, weights) in zip(firsts[:-1], durations, strict=True))
  # A stage of its own after the last, so that all that are looked at end.
  mixture = Mixture((*stages, (firsts[-1], stages[0][1])), batch_size, seed)
  for (first, weights), end in zip(stages, firsts[1:], strict=True):
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    start, stop = first * batch_size, end * batch_size
    before = np.array(mixture.given_before(start))
    for block_end in [*range(start + BLOCK, stop - BLOCK + 1, BLOCK), stop]:
      given = (np.array(mixture.given_before(block_end)) - before).tolist()
      source, number = mixture.locate(block_end - 1)
      assert number == before[source] + given[source] - 1
      assert sum(given) == block_end - start
      for count, share in zip(given, shares, strict=True):
        assert abs(count - share * (block_end - start)) < 1
        assert share or not count


def test_rows_given_before_a_row_are_those_that_counting_finds():
  mixture, given = Mixture(STAGES, 8, 0), [0] * 4
  for row in range(11_000):
    assert mixture.given_before(row) == given
    given[mixture.locate(row)[0]] += 1


def test_a_row_does_not_depend_on_what_was_asked_before():
  mixture = Mixture(STAGES, 8, 0)
  rows = np.random.default_rng(0).integers(0, 10**6, 200).tolist()
  assert [mixture.locate(row) for row in rows] == [Mixture(STAGES, 8, 0).locate(row) for row in rows]


def test_shares_do_not_drift_over_billions_of_rows():
  mixture = Mixture(((0, (0.1, 0.2, 0.7)),), 1, 0)
  rows = BLOCK * 10**7
  shares = [Fraction(weight) / sum(map(Fraction, (0.1, 0.2, 0.7))) for weight in (0.1, 0.2, 0.7)]
  for count, share in zip(mixture.given_before(rows), shares, strict=True):
    assert abs(count - share * rows) < 1


def test_a_source_of_few_rows_has_its_share_in_longer_blocks():
  mixture = Mixture(((0, (0.9997, 0.0001, 0.0002)),), 1, 0)
  _, rare, less_rare = mixture.given_before(100_010)
  assert abs(rare - 10) <= 1
  assert abs(less_rare - 20) <= 1
  assert [mixture.locate(row) for row in range(30_000)] == list(counted(mixture, 30_000))


def test_every_block_has_an_order_of_its_own():
  mixture = Mixture(((0, (0.5, 0.5)),), 1, 0)
  blocks = [[mixture.locate(row)[0] for row in range(start, start + BLOCK)] for start in (0, BLOCK, 5 * BLOCK)]
  assert blocks[0] != blocks[1] != blocks[2]


def test_without_a_seed_sources_alternate():
  sources = [Mixture(((0, (3.0, 1.0)),), 4, None).locate(row)[0] for row in range(2 * BLOCK)]
  for row in range(0, 2 * BLOCK, 4):
    assert sum(sources[row : row + 4]) == 1


def test_only_ratios_matter():
  first, second = (Mixture(((0, weights),), 4, 0) for weights in ((1, 3), (0.25, 0.75)))
  assert [first.locate(row) for row in range(3000)] == [second.locate(row) for row in range(3000)]


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    (((0, (1.0, -0.5)),), r"the weights \(1.0, -0.5\) of data.mixture have -0.5; choose 0 or more"),
    (((0, (1.0, float("nan"))),), "data.mixture have nan"),
    (((0, (float("inf"), 1.0)),), "data.mixture have inf"),
    (((0, (0.0, 0.0)),), "data.mixture leave every source out"),
    (((0, ()),), "data.mixture leave every source out"),
    (((0, (1.0, 1e-9)),), "data.mixture give less than a millionth of the rows for 1e-09"),
    (((0, (1.0, 1.0)), (5, (1.0,))), "data.stages at step 5 are 1 for 2 sources"),
    (((0, (1.0, 1.0)), (5, (0.0, 0.0))), "data.stages at step 5 leave every source out"),
    (((3, (1.0,)),), r"data.stages begin at steps \(3\)"),
    ((), r"data.stages begin at steps \(\)"),
    (((0, (1.0,)), (5, (1.0,)), (5, (1.0,))), r"data.stages begin at steps \(0, 5, 5\)"),
  ],
)
def test_stages_that_cannot_be_meant_are_refused(stages, message):
  with pytest.raises(ConfigError, match=message):
    Mixture(stages, 4, 0)
