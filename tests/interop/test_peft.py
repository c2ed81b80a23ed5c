"""Adapters of PEFT mean here what they mean there, and are written as they were read."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.interop.conftest import load_fixture
from tests.interop.peft_adapters import (
  ADAPTERS,
  NAMES,
  TOLERANCE,
  assert_same,
  base_of,
  changed,
  compute_logits,
  merge,
  random_adapter,
  read_fixture,
  with_tensors,
  written,
)
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.interop.peft import read_adapter, write_adapter


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_adapter_computes_the_logits_of_torch(name):
  base, expected = base_of(name), load_file(ADAPTERS / name / "expected.safetensors")
  without = compute_logits(base.model, base.params, expected["tokens"])
  assert np.abs(without - expected["logits"]).max() > 0.1
  ours = compute_logits(base.model, merge(base.model, base.params, read_fixture(name)), expected["tokens"])
  np.testing.assert_allclose(ours, expected["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_wrote_is_written_and_imported_to_the_same_bits(name, tmp_path):
  base = base_of(name)
  layout = "per_expert" if name == "mixtral_apart" else "fused"
  write_adapter(tmp_path, base.model, base.family, read_fixture(name), layout)
  assert_same(read_adapter(tmp_path, base.model, base.family), read_fixture(name))


@pytest.mark.parametrize("name", ["mixtral_attention", "mixtral_dora", "mixtral_converted", "mixtral_fused", "llama"])
def test_an_exported_adapter_has_the_tensors_it_was_imported_from(name, tmp_path):
  base = base_of(name)
  write_adapter(tmp_path, base.model, base.family, read_fixture(name), "fused")
  original = load_file(ADAPTERS / name / "adapter_model.safetensors")
  _, tensors = written(tmp_path)
  assert tensors.keys() == original.keys()
  for key, tensor in original.items():
    np.testing.assert_array_equal(tensors[key], tensor, key)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("base", ["mixtral", "qwen3_moe", "olmoe"])
def test_an_exported_adapter_of_everything_is_imported_to_the_same_bits(base, layout, tmp_path):
  fixture = load_fixture(base)
  adapter = random_adapter(fixture.model, fixture.family, ".")
  write_adapter(tmp_path, fixture.model, fixture.family, adapter, layout)
  assert_same(read_adapter(tmp_path, fixture.model, fixture.family), adapter)


@pytest.mark.parametrize(
  ("name", "values", "words"),
  [
    ("llama", {"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ("llama", {"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
    ("llama", {"bias": "lora_only"}, "bias='lora_only'"),
    ("llama", {"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ("llama", {"lora_bias": True}, "lora_bias=True"),
    ("llama", {"trainable_token_indices": [3]}, "trainable_token_indices"),
    ("llama", {"layer_replication": [[0, 2]]}, "layer_replication"),
    ("llama", {"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ("llama", {"a_key_of_tomorrow": 1}, "a_key_of_tomorrow=1 is not computed"),
    ("llama", {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ("llama", {"init_lora_weights": "olora"}, "changed the base weights"),
    ("mixtral_fused", {"peft_version": "0.18.1"}, "before 0.19"),
    ("mixtral_fused", {"peft_version": None}, "before 0.19"),
  ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(name, values, words, tmp_path):
  base = base_of(name)
  with pytest.raises(ConfigError, match=words):
    read_adapter(changed(tmp_path, name, **values), base.model, base.family)


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_keep_the_base_are_read(init, tmp_path):
  base = base_of("llama")
  assert_same(
    read_adapter(changed(tmp_path, "llama", init_lora_weights=init), base.model, base.family), read_fixture("llama")
  )


@pytest.mark.parametrize(
  ("rename", "words"),
  [
    (lambda key: key.replace("q_proj", "x_proj"), r"self_attn\.x_proj is no module of LlamaForCausalLM"),
    (lambda key: key.replace("base_model.", ""), r"does not begin with base_model\.model"),
    (lambda key: key.replace("q_proj.lora_A.weight", "q_proj.lora_B.bias"), "lora_bias"),
    (lambda key: key.replace("q_proj.lora_A.weight", "q_proj.lora_embedding_A"), "modules_to_save"),
    (lambda key: re.sub(r"q_proj\.lora_[AB]", "q_proj.lora_C", key), r"q_proj\.lora_C\.weight is no tensor"),
    (lambda key: key.replace("layers.1", "layers.7"), r"layers\.7\.\S+ is no"),
  ],
)
def test_unknown_keys_are_refused_by_name(rename, words, tmp_path):
  base, directory = base_of("llama"), changed(tmp_path, "llama")
  path = directory / "adapter_model.safetensors"
  save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path)
  with pytest.raises((CheckpointError, ConfigError), match=words):
    read_adapter(directory, base.model, base.family)


@pytest.mark.parametrize(
  ("name", "edit", "words"),
  [
    ("llama", {"self_attn.q_proj.lora_A": lambda x: x[:1]}, r"q_proj: lora_A has shape \(1, 32\); rank 2"),
    ("llama", {"input_layernorm": lambda x: x[:1]}, r"has shape \(1,\); the base model has \(32,\)"),
    ("llama", {"q_proj.lora_B": None}, r"q_proj has \['lora_A'\]"),
    ("mixtral_apart", {r"experts\.3\.w1": None}, r"moe\.gate\.kernel: experts \[0, 1, 2\] of 4"),
    ("mixtral_dora", {"magnitude": None}, "use_dora=True wants"),
  ],
)
def test_damaged_tensors_are_refused(name, edit, words, tmp_path):
  base = base_of(name)
  with pytest.raises(CheckpointError, match=words):
    read_adapter(with_tensors(tmp_path, name, edit), base.model, base.family)


def test_a_rank_that_is_not_the_config_s_is_refused(tmp_path):
  base = base_of("mixtral_apart")
  with pytest.raises(CheckpointError, match="rank 3 and the model want"):
    read_adapter(changed(tmp_path, "mixtral_apart", rank_pattern={"w2": 3}), base.model, base.family)


def test_pickled_weights_are_refused(tmp_path):
  base, directory = base_of("llama"), changed(tmp_path, "llama")
  (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
  with pytest.raises(CheckpointError, match="pickled"):
    read_adapter(directory, base.model, base.family)
