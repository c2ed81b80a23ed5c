import dataclasses
import json

import pytest

from configs import base
from tests.conftest import tiny_model
from ultrathink_jax.config import Config, from_mapping
from ultrathink_jax.errors import ConfigError


def values(**changes):
  """Returns the base configuration with dotted keys (a__b) changed."""
  config = base.get_config().to_dict()
  for path, value in changes.items():
    section, _, key = path.rpartition("__")
    (config[section] if section else config)[key] = value
  return config


def test_every_key_of_the_base_config_is_known_and_used():
  config = from_mapping(base.get_config().to_dict())
  assert json.loads(config.to_json()) == json.loads(json.dumps(base.get_config().to_dict()))


def test_a_saved_config_reads_back_the_same():
  config = from_mapping(base.get_config().to_dict())
  assert from_mapping(json.loads(config.to_json()), Config) == config


def test_an_unknown_key_names_the_nearest_one():
  with pytest.raises(ConfigError, match=r"train\.stesp .* did you mean train\.steps\?"):
    from_mapping(values(train__stesp=5))


def test_a_missing_key_is_named():
  config = values()
  del config["train"]["steps"]
  with pytest.raises(ConfigError, match=r"lacks train\.steps"):
    from_mapping(config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model__num_heads": 5, "model__num_kv_heads": 2},
      r"num_heads=5 .* model.num_kv_heads=2; choose num_kv_heads in 1, 5",
    ),
    ({"model__head_dim": 7}, "head_dim=7 is odd"),
    ({"model__experts_per_token": 9}, "experts_per_token=9 exceeds .*num_experts=8"),
    ({"model__mamba_head_dim": 60}, "mamba_head_dim=60"),
    ({"model__mamba_num_groups": 3}, "mamba_num_groups=3"),
    ({"model__dtype": "bf16"}, "dtype='bf16' is not one of bfloat16, float32; did you mean 'bfloat16'"),
    ({"model__embed_dim": 0}, "embed_dim=0 is below 1"),
    ({"model__capacity_factor": -1.0}, "capacity_factor=-1.0 is below 0"),
    ({"model__embed_dim": 2.5}, "embed_dim=2.5 has type float; it takes int"),
    ({"model__tie_embeddings": 1}, "tie_embeddings=1 has type int; it takes bool"),
    ({"train__batch_size": 16, "train__accumulation_steps": 3}, "accumulation_steps=3; choose .* 1, 2, 4, 8, 16"),
    ({"train__steps": True}, "steps=True has type bool"),
    ({"optimizer__beta1": 1.0}, r"beta1=1.0 is outside \[0, 1\)"),
    ({"optimizer__learning_rate": float("nan")}, "learning_rate=nan"),
    ({"optimizer__clip_norm": 0.0}, "clip_norm=0.0 is not positive"),
    ({"generate__top_p": 0.0}, "top_p=0.0"),
    ({"mesh__data": -1, "mesh__fsdp": -1}, "data, fsdp are all -1"),
    ({"mesh__tensor": 0}, "mesh.tensor=0"),
    ({"data__validation_fraction": 1.5}, "validation_fraction=1.5"),
    ({"model": 3}, "model=3 is not a section"),
  ],
)
def test_a_wrong_value_is_refused_with_the_rule(changes, message):
  with pytest.raises(ConfigError, match=message):
    from_mapping(values(**changes))


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    tiny_model().embed_dim = 3
