import dataclasses

import numpy as np
import pytest

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.recipes.pretrain import summarize

GROUPS = {"router": "grouped", "expert_groups": "knowledge=4,skill=2,meta=1,safety=1"}


def summary(load, dropped=0.0, **changes):
  """Returns the reported numbers of a model of two expert layers whose choices are `load` [2, E]."""
  model = tiny_model(layers="(E)x2", num_experts=np.shape(load)[1], **changes)
  sums = {"weight": 10.0, "loss/lm": 20.0, "moe/dropped": dropped, "moe/load/group_0/moe_0": np.asarray(load)}
  return summarize(dataclasses.replace(tiny_config(), model=model), sums)


def test_an_even_load_reads_as_even_everywhere():
  values = summary(np.full((2, 8), 50), **GROUPS)
  expected = {"moe/entropy": 1, "moe/knowledge/entropy": 1, "moe/skill/entropy": 1}
  expected |= {"moe/knowledge/share": 0.5, "moe/skill/share": 0.25, "moe/meta/share": 0.125, "moe/safety/share": 0.125}
  expected |= {"loss": 2, "moe/max_expert": 0.125, "moe/dropped": 0, "moe/dead": 0}
  assert {key: value for key, value in values.items() if key != "moe/load"} == pytest.approx(expected)


def test_entropies_are_means_over_layers_of_each_one_divided_by_its_maximum():
  values = summary([[8, 0, 0, 0, 1, 3, 2, 2], [1, 1, 1, 1, 2, 2, 4, 4]], **GROUPS)
  np.testing.assert_allclose(values["moe/knowledge/entropy"], (0 + 1) / 2, atol=1e-6)
  quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
  np.testing.assert_allclose(values["moe/skill/entropy"], (quarter + 1) / 2, rtol=1e-6)
  np.testing.assert_allclose(values["moe/skill/share"], 0.25, rtol=1e-6)


def test_experts_below_a_tenth_of_an_even_share_are_dead_and_dropped_is_a_share():
  values = summary([[1000, 24, 1000, 976], [990, 1000, 1000, 10]], dropped=60)
  assert values["moe/dead"] == 2
  np.testing.assert_allclose(values["moe/dropped"], 0.01)
  np.testing.assert_allclose(values["moe/max_expert"], 1 / 3)


def test_a_group_that_no_layer_chose_has_a_share_and_no_entropy():
  values = summary([[1, 1, 1, 1, 0, 0, 1, 1]] * 2, **GROUPS)
  assert values["moe/skill/share"] == 0
  assert "moe/skill/entropy" not in values
