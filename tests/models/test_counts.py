import importlib
from pathlib import Path

import jax
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.config import from_mapping
from ultrathink_jax.models.counts import count_model, train_flops_per_token
from ultrathink_jax.models.language_model import init_params

TOTALS = {
  "ultra_edge1b": 1.02e9, "ultra3b": 3_036_876_032, "ultra13b": 13_154_295_808, "ultra52b": 52_040_148_992,
  "ultra390b": 398_500_806_656, "ultrathink_tiny": 124_766_976, "ultrathink_small": 353_551_360,
  "ultrathink_medium": 756_819_456, "ultrathink_large": 1_294_338_048, "ultrathink_xl": 2_677_066_240,
  "mixtral_8x7b": 46_702_792_704, "mixtral_8x22b": 140_630_071_296,
}  # fmt: skip
ACTIVE = {"ultra3b": 1_281_559_808, "ultra13b": 3_207_503_872, "ultra52b": 21_123_934_208, "ultra390b": 53_326_364_672}
FILES = (Path(__file__).parents[2] / "configs").glob("*.py")
CONFIGS = sorted({path.stem for path in FILES} - {"optimizers", "presets"})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_has_the_size_of_its_name(name):
  config = from_mapping(importlib.import_module(f"configs.{name}").get_config().to_dict())
  count = count_model(config.model)
  if name in TOTALS:
    assert count.total == pytest.approx(TOTALS[name], rel=0.01 if name == "ultra_edge1b" else 0)
  if name in ACTIVE:
    assert count.active == ACTIVE[name]


def test_counts_equal_the_parameters_there_are():
  model = tiny_model(layers="(MAFE)x2 L")
  params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  assert count_model(model).total == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_active_parameters_leave_out_the_experts_not_chosen():
  model = tiny_model(layers="E")
  count = count_model(model)
  assert count.total - count.active == 2 * 3 * model.embed_dim * model.expert_dim


def test_flops_of_a_dense_model_are_six_per_parameter_and_token_plus_attention():
  model = tiny_model(layers="(AF)x3")
  count = count_model(model)
  expected = 6 * (count.active - count.embedding) + 3 * 6 * model.num_heads * model.head_dim * 128
  assert train_flops_per_token(model, count, 128) == expected
