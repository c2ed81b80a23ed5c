"""Which matrices are adapted, and the counts that people compare with PEFT's."""

import dataclasses

import pytest

from tests.lora.adapted_runs import make
from ultrathink_jax.config import from_mapping
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.lora.coverage import count_trained, describe
from ultrathink_jax.lora.targets import find_targets


def names(**lora):
  return {name for target in find_targets(make({"rank": 4} | lora)) for name in target.names}


@pytest.mark.parametrize(
  ("preset", "parts"),
  [
    ("attention", {"attention.query", "attention.key", "attention.value", "attention.out"}),
    ("mlp", {"mlp.gate", "mlp.up", "mlp.down"}),
    ("experts", {"moe.gate", "moe.up", "moe.down"}),
    ("router", {"moe.router"}),
    ("mamba", {f"mamba.{part}" for part in ("gate", "x", "b", "c", "dt", "out")}),
  ],
)
def test_a_preset_is_a_kind_of_layer_in_every_repeat(preset, parts):
  found = names(targets=(preset,), rank=1)
  assert {name.split(".", 2)[2] for name in found} == parts
  assert len(found) == 2 * len(parts)


def test_all_is_everything_but_the_router():
  kinds = {name.split(".", 2)[2] for name in names(targets=("all",), rank=1)}
  assert "moe.router" not in kinds
  assert len(kinds) == 16


def test_the_first_pattern_gives_the_rank_and_experts_have_less():
  lora = {"rank": 4, "targets": ("attention", "experts"), "rank_pattern": ("*.query=2", "layers.1.*=3")}
  rank = {name: r for t in find_targets(make(lora)) for name, r in zip(t.names, t.ranks, strict=True)}
  assert rank["layers.1.attention.query"] == 2
  assert rank["layers.1.attention.key"] == 3
  assert rank["layers.5.attention.key"] == 4
  assert rank["layers.3.moe.up"] == 2  # 4 / 2 experts a token


@pytest.mark.parametrize(
  ("lora", "said"),
  [
    ({"targets": ("atention",)}, "attention"),
    ({"targets": ("*.qery",)}, "matches no weight matrix"),
    ({"rank_pattern": ("*.mlp.up=2",)}, "matches no adapted matrix"),
    ({"targets": ("experts",), "dropout": 0.1}, "lora.dropout"),
    ({"targets": ("experts",), "variant": "dora"}, "dora"),
    ({"targets": ("layers.1.*",), "variant": "dora"}, "leave out layers"),
    ({"rank": 40, "init": "pissa"}, "singular vectors"),
  ],
)
def test_what_cannot_be_is_one_line_with_the_way_out(lora, said):
  with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
    find_targets(make({"rank": 4} | lora))


@pytest.mark.parametrize(
  ("key", "value"),
  [("init", "olora"), ("variant", "loha"), ("scaling", "sqrt"), ("base_dtype", "int3"), ("rank_pattern", ("query",))],
)
def test_wrong_values_are_refused(key, value):
  with pytest.raises(ConfigError, match=key):
    make({"rank": 4, key: value})


def test_a_few_bits_without_anything_frozen_are_refused():
  with pytest.raises(ConfigError, match="base_dtype"):
    make({"base_dtype": "int8"})


def test_mixtral_counts_are_those_of_the_guide():
  from configs import mixtral_8x7b

  config = from_mapping(mixtral_8x7b.get_config().to_dict())
  lora = lambda **changes: dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=16, **changes))
  trained, total = count_trained(lora(targets=("attention",)))
  assert trained == 13_631_488
  assert total == 46_702_792_704 + 13_631_488
  assert count_trained(lora(targets=("experts",), expert_rank=16))[0] == 226_492_416
  lines = describe(lora(targets=("attention",)))
  assert lines[0] == "trainable params: 13,631,488 || all params: 46,716,424,192 || trainable%: 0.0292"
  assert "attention.value of 32 layers" in lines[1]
