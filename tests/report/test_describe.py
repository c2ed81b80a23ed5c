import pytest

from tests.conftest import tiny_config
from ultrathink_jax.report.describe import format_description

TRAIN = {"batch_size": 4, "sequence_length": 64, "steps": 10, "tokens": 0, "epochs": 0.0}


@pytest.mark.parametrize(
  ("changes", "length"),
  [
    ({}, "256 tokens a step, 2,560 in 10 steps"),
    ({"tokens": 1000}, "256 tokens a step, 1,024 in 4 steps"),
    ({"epochs": 2.5}, "256 tokens a step, until the data has been read 2.5 times (train.epochs)"),
  ],
)
def test_the_length_of_a_run_is_told_by_what_sets_it(changes, length):
  lines = format_description(tiny_config(train=TRAIN | changes)).splitlines()
  assert f"batch     {length}" in lines
