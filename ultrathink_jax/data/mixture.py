"""Which source each row of a run is from: shares that change at steps, exact counts, any row without those before it.

Rows are counted over the run: row `step * batch_size + position`. The rows of a stage are cut into blocks. By the end
of a block each source has given its share of the stage up to less than one row, however many blocks came before; inside
a block the order is a permutation. The rows of a source are counted over all stages, none left out and none twice:
where a stage begins, each source goes on where it was.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from ultrathink_jax.data.packing import generator
from ultrathink_jax.errors import ConfigError

_BLOCK_ROWS = 1024
_MIN_SHARE = 1e-6  # a block has at least one over the smallest share rows

WeightStages = Sequence[tuple[int, Sequence[int | float]]]


class _Stage(NamedTuple):
  """Rows that are shared out in one way.

  Attributes:
    num_rows: None for the last stage, which has no end.
    before: rows that each source gives in earlier stages.
    bounds: what the first 0, 1, .. k sources count together, as whole numbers.
    block_rows: of so many rows every source gives one or more, so that rounding never takes a row back.
  """

  first_row: int
  num_rows: int | None
  before: list[int]
  bounds: list[int]
  block_rows: int

  def given(self, rows: int) -> list[int]:
    """Returns how many of the first `rows` rows of the stage each source gives, where a block ends there.

    What the first i sources give together is rounded down, so the error of each is below one row.
    """
    rounded = [bound * rows // self.bounds[-1] for bound in self.bounds]
    return [high - low for low, high in pairwise(rounded)]

  def block(self, offset: int) -> tuple[int, int]:
    """Returns where the block of a row begins and ends; the last one of a stage takes in what would be a short one."""
    number = offset // self.block_rows
    if self.num_rows is not None:
      last = max(self.num_rows // self.block_rows, 1) - 1
      if number >= last:
        return last * self.block_rows, self.num_rows
    return number * self.block_rows, (number + 1) * self.block_rows


class Mixture:
  """The source of every row of a run, and which of that source's rows it is.

  `weights_by_stage` are the step at which each stage begins, the first one 0, and what each source counts from then on;
  only ratios matter and 0 leaves a source out. Without a seed, the sources alternate as evenly as they can in a block.
  """

  def __init__(self, weights_by_stage: WeightStages, batch_size: int, seed: int | None):
    require_weights(weights_by_stage)
    self.num_sources = len(weights_by_stage[0][1])
    self._seed = seed
    self._first_rows = [step * batch_size for step, _ in weights_by_stage]
    self._stages: list[_Stage] = []
    before = [0] * self.num_sources
    ends = [*self._first_rows[1:], None]
    for first, end, (_, weights) in zip(self._first_rows, ends, weights_by_stage, strict=True):
      num_rows = None if end is None else end - first
      stage = _Stage(first, num_rows, before, *_shares(weights))
      self._stages.append(stage)
      if num_rows is not None:
        before = _add(before, stage.given(num_rows))
    self._order = functools.lru_cache(maxsize=8)(self._lay_out)

  def locate(self, row: int) -> tuple[int, int]:
    """Returns the source of a row and the row's number among those of the source."""
    stage, start, stop, offset = self._find(row)
    sources, numbers = self._order(stage, start, stop)
    return int(sources[offset]), int(numbers[offset])

  def given_before(self, row: int) -> list[int]:
    """Returns how many of the rows before this one each source gives."""
    number, start, stop, offset = self._find(row)
    stage = self._stages[number]
    sources, _ = self._order(number, start, stop)
    within = np.bincount(sources[:offset], minlength=self.num_sources).tolist()
    return _add(_add(stage.before, stage.given(start)), within)

  def _find(self, row: int) -> tuple[int, int, int, int]:
    """Returns the number of a row's stage, where its block begins and ends in the stage and its place in the block."""
    number = bisect_right(self._first_rows, row) - 1
    offset = row - self._first_rows[number]
    start, stop = self._stages[number].block(offset)
    return number, start, stop, offset - start

  def _lay_out(self, number: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source of each row of a block and the row's number among those of the source."""
    stage = self._stages[number]
    begin = stage.given(start)
    counts = np.subtract(stage.given(stop), begin)
    sources = np.repeat(np.arange(self.num_sources), counts)
    within = np.arange(stop - start) - np.repeat(np.cumsum(counts) - counts, counts)
    if self._seed is None:
      order = np.argsort((within + 0.5) / counts[sources], kind="stable")
      return sources[order], (np.add(stage.before, begin)[sources] + within)[order]
    sources = generator(self._seed, number, start).permutation(sources)
    numbers = np.empty(stop - start, np.int64)
    numbers[np.argsort(sources, kind="stable")] = within
    return sources, numbers + np.add(stage.before, begin)[sources]


def _shares(weights: Sequence[int | float]) -> tuple[list[int], int]:
  """Returns the bounds and block size of a stage, without rounding."""
  exact = [Fraction(weight) for weight in weights]
  total = sum(exact)
  smallest = min(weight for weight in exact if weight)
  bounds = [bound / total for bound in accumulate(exact, initial=Fraction(0))]
  scale = math.lcm(*(bound.denominator for bound in bounds))
  return [int(bound * scale) for bound in bounds], max(_BLOCK_ROWS, math.ceil(total / smallest))


def _add(counts: Sequence[int], others: Sequence[int]) -> list[int]:
  return [a + b for a, b in zip(counts, others, strict=True)]


def require_weights(weights_by_stage: WeightStages) -> None:
  """Raises ConfigError unless the weights of every stage can share out rows."""
  require_first_steps("data.stages", weights_by_stage)
  num_sources = len(weights_by_stage[0][1])
  for number, (step, weights) in enumerate(weights_by_stage):
    what = f"the weights {_listed(weights)} of " + (f"data.stages at step {step}" if number else "data.mixture")
    if len(weights) != num_sources:
      raise ConfigError(
        f"{what} are {len(weights)} for {num_sources} sources; give one for each source, 0 to leave it out"
      )
    bad = [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]
    if bad:
      raise ConfigError(f"{what} have {bad[0]}; choose 0 or more for each source")
    if not any(weights):
      raise ConfigError(f"{what} leave every source out; give one source or more a weight above 0")
    smallest = min(weight for weight in weights if weight)
    if smallest / sum(weights) < _MIN_SHARE:
      raise ConfigError(f"{what} give less than a millionth of the rows for {smallest}; choose 0 or a larger weight")


def require_first_steps(key: str, stages: Sequence[tuple[int, Any]]) -> None:
  """Raises ConfigError unless stages begin at step 0 and each later than the one before it."""
  steps = [step for step, _ in stages]
  if steps[:1] != [0] or any(later <= earlier for earlier, later in pairwise(steps)):
    raise ConfigError(
      f"{key} begin at steps {_listed(steps)}; begin the first at 0 and each later than the one before it"
    )


def _listed(values: Sequence[int | float]) -> str:
  return "(" + ", ".join(map(str, values)) + ")"
