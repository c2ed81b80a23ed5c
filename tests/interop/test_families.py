"""Patterns, tables and keys of config.json."""

import dataclasses
import random

import pytest

from tests.conftest import tiny_model
from ultrathink_jax import patterns
from ultrathink_jax.config import ModelConfig, from_mapping
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import FAMILIES, keys
from ultrathink_jax.interop.families.pattern import compact
from ultrathink_jax.interop.huggingface import model_of

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_a_compact_pattern_spells_the_same_layers(length):
  choose = random.Random(length)
  letters = "".join(choose.choices("AMFE", k=length))
  assert patterns.spell(patterns.parse(compact(letters), "AMFE")) == letters


@pytest.mark.parametrize(
  ("letters", "pattern"),
  [("AF" * 12, "(AF)x12"), ("AFAFAFM", "(AF)x3 M"), ("MMMMMMAF" * 2, "(MMMMMMAF)x2"), ("MEMEAEMEAE", "ME (MEAE)x2")],
)
def test_a_compact_pattern_writes_out_few_layers(letters, pattern):
  assert compact(letters) == pattern


def test_what_an_architecture_lacks_has_a_value_for_every_key():
  required = {"layers", "vocab_size", "embed_dim"}
  assert keys.NEUTRAL.keys() | required == {field.name for field in dataclasses.fields(ModelConfig)}
  from_mapping(keys.NEUTRAL | {"layers": "A", "vocab_size": 2, "embed_dim": 2, "mamba_head_dim": 4}, ModelConfig)


def test_no_two_rows_of_a_table_name_the_same_tensor():
  for family in FAMILIES.values():
    tables = [*family.rows.values(), *([family.fused] if family.fused else [])]
    for table in tables:
      names = [row.theirs for row in table]
      assert len(names) == len(set(names)), family.model_type


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ({"rope_theta": 5e5, "torch_dtype": "bfloat16"}, {"rope_parameters": {"rope_theta": 5e5}, "dtype": "bfloat16"}),
    (
      {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
      {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
      {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    ),
  ],
)
def test_both_spellings_of_positions_and_types_mean_the_same(old, new):
  assert model_of(FAMILIES["llama"], LLAMA | old) == model_of(FAMILIES["llama"], LLAMA | new)


def test_both_scales_of_yarn_become_one_factor():
  rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 512, "mscale": 1.0}
  read = lambda rope: model_of(FAMILIES["llama"], LLAMA | {"rope_parameters": rope}).rope.attention_factor
  assert read(rope | {"mscale_all_dim": 0.5}) == pytest.approx(1.3688879 / 1.1844440)
  assert read(rope) == 0
  assert read(rope | {"attention_factor": 1.2}) == 1.2


def test_absent_keys_take_the_value_of_their_class():
  mistral = model_of(FAMILIES["mistral"], LLAMA)
  assert (mistral.layers, mistral.window_tokens, mistral.num_kv_heads) == ("(LF)x2", 4096, 4)
  assert model_of(FAMILIES["mistral"], LLAMA | {"sliding_window": None}).layers == "(AF)x2"
  assert model_of(FAMILIES["mixtral"], LLAMA).rope.theta == 1e6
  assert model_of(FAMILIES["qwen3"], LLAMA).head_dim == 128


def test_a_key_without_a_value_is_named():
  with pytest.raises(ConfigError, match=r"config\.json has no hidden_size"):
    model_of(FAMILIES["llama"], {"model_type": "llama", "vocab_size": 3})


def test_an_upper_limit_of_the_time_step_survives_json():
  model = tiny_model(layers="MM", mamba_norm_groups=2, mamba_dt_min=0.1)
  family = FAMILIES["mamba2"]
  written = family.write(model)
  assert written["time_step_limit"] == [0.1, {"__float__": "Infinity"}]
  assert model_of(family, written).mamba_dt_max == 0
  assert model_of(family, written | {"time_step_limit": [0.1, float("inf")]}).mamba_dt_max == 0
  assert model_of(family, written | {"time_step_limit": [0.1, 0.7]}).mamba_dt_max == 0.7
