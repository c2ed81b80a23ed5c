"""Devices are known by what JAX calls them."""

import pytest

from ultrathink_jax.parallel.chips import CHIPS, chip_of, peak_flops


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA B200", "b200"),
  ],
)
def test_a_chip_is_found_by_its_name(name, kind):
  assert chip_of(name) is CHIPS[kind]


def test_the_peak_of_an_unknown_chip_is_not_guessed():
  assert chip_of("TPU v4") is None
  assert peak_flops() is None  # tests run on a CPU
