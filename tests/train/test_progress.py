"""When training ends early, and which step it is the result of."""

import dataclasses

import pytest

from tests.conftest import tiny_config
from ultrathink_jax.train.progress import Progress

CONFIG = dataclasses.replace(tiny_config().evaluate, patience=2)


def after(values, **changes):
  """Returns the progress after evaluations at steps 10, 20, 30 ..."""
  progress, config = Progress(), dataclasses.replace(CONFIG, **changes)
  for number, value in enumerate(values):
    assert not progress.has_ended
    progress = progress.after_evaluation(config, 10 * (number + 1), value)
  return progress


def test_training_goes_on_as_long_as_one_of_the_last_evaluations_was_the_best():
  progress = after([3.0, 2.0, 2.5, 1.9, 1.95])
  assert (progress.best, progress.best_step, progress.worse, progress.has_ended) == (1.9, 40, 1, False)


def test_training_ends_with_the_evaluation_that_exhausts_patience():
  progress = after([3.0, 2.0, 2.5, 2.1])
  assert (progress.best_step, progress.has_ended) == (20, True)


def test_the_highest_can_be_the_best():
  progress = after([0.1, 0.3, 0.2, 0.25], best_is="highest")
  assert (progress.best, progress.best_step, progress.has_ended) == (0.3, 20, True)


def test_a_gain_below_the_least_is_none():
  progress = after([3.0, 2.95, 2.91], min_delta=0.1)
  assert (progress.best, progress.has_ended) == (3.0, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_never_the_best(value):
  assert after([value, value]).best is None
  assert after([2.0, value]).best == 2.0


def test_without_patience_training_never_ends_early():
  assert not after([1.0, *[2.0] * 50], patience=0).has_ended
