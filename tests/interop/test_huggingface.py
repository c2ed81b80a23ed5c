"""Checkpoints of transformers mean here what they mean there, and are written as they were read."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.conftest import tiny_model
from tests.interop.conftest import FIXTURES, load_fixture
from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.interop import huggingface
from ultrathink_jax.interop.families import FAMILIES
from ultrathink_jax.models.language_model import LanguageModel, init_cache, init_params, logits, single_documents
from ultrathink_jax.types import Context

IDS = {"bos_token_id": 1, "eos_token_id": 2}
TOLERANCE = 2e-4  # of logits of size 3: float32 sums in another order


@partial(jax.jit, static_argnums=0)
def compute_logits(model: ModelConfig, params, tokens):
  return logits(LanguageModel(model).apply({"params": params}, tokens, single_documents(tokens)))


@partial(jax.jit, static_argnums=0)
def decode_step(model: ModelConfig, params, cache, token, position):
  context = Context(jnp.full((2, 1), position), jnp.ones((2, 1), jnp.int32))
  output = LanguageModel(model).apply({"params": params}, token[:, None], context, cache)
  return logits(output)[:, 0], output.cache


def all_tensors(directory):
  """Returns every weight of a directory in float32, whatever the files they are in."""
  tensors = {}
  for path in directory.glob("model*.safetensors"):
    with safe_open(path, "flax") as file:
      tensors |= {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
  return tensors


def test_an_imported_model_computes_the_logits_of_transformers(fixture):
  ours = compute_logits(fixture.model, fixture.params, fixture.tokens)
  assert np.abs(fixture.logits).max() > 1
  np.testing.assert_allclose(ours, fixture.logits, rtol=0, atol=TOLERANCE)


def test_decoding_an_imported_model_token_by_token_gives_the_same_logits(fixture):
  model, tokens, expected = fixture.model, fixture.tokens, fixture.logits
  if model.rope.scaling == "dynamic":  # keys of a longer text were turned when they were cached, by other angles
    tokens = tokens[:, : model.rope.original_tokens]
    expected = compute_logits(model, fixture.params, tokens)
  cache = init_cache(model, 2, tokens.shape[1])
  for position in range(tokens.shape[1]):
    ours, cache = decode_step(model, fixture.params, cache, tokens[:, position], position)
    np.testing.assert_allclose(ours, expected[:, position], rtol=0, atol=TOLERANCE)


def test_an_exported_model_has_the_tensors_it_was_imported_from(fixture, tmp_path):
  huggingface.save(tmp_path, fixture.model, fixture.params, IDS, fixture.family)
  written, original = all_tensors(tmp_path), all_tensors(fixture.directory)
  if fixture.name in ("mixtral_fused", "qwen3_moe_normalized"):  # experts are written apart, as both versions read them
    original = {name: tensor for name, tensor in original.items() if ".experts." not in name and ".gate." not in name}
    written = {name: tensor for name, tensor in written.items() if ".experts." not in name and ".gate." not in name}
  assert written.keys() == original.keys()
  for name, tensor in original.items():
    np.testing.assert_array_equal(written[name], tensor, name)


def test_an_exported_model_is_imported_to_the_same_bits(fixture, tmp_path):
  huggingface.save(tmp_path, fixture.model, fixture.params, IDS, fixture.family)
  model, params = huggingface.load(tmp_path)
  assert dataclasses.replace(model, dtype="float32", remat="none") == fixture.model
  jax.tree.map(np.testing.assert_array_equal, params, fixture.params)


def test_an_imported_model_fits_the_family_it_came_from(fixture):
  assert huggingface.find_exact(fixture.model, fixture.family)[0] is fixture.family


# What keys of a fixture's model are changed to. Were one without effect on the logits, its import would be untested.
CHANGES = [
  ("llama", {"norm_epsilon": 1e-6}),
  ("llama", {"rope.scaling": "none"}),
  ("llama_v4", {"rope.factor": 1.0}),
  ("mistral", {"window_tokens": 8}),
  ("mistral", {"rope.attention_factor": 1.0}),
  ("mistral", {"rope.beta_fast": 32.0}),
  ("mixtral", {"rope.theta": 1e4}),
  ("mixtral_fused", {"rope.theta": 1e4}),
  ("qwen2", {"window_tokens": 7}),
  ("qwen3", {"rope.factor": 2.0}),
  ("qwen3_moe", {"router_normalize": True}),
  ("olmoe", {"qkv_clip": 0.0}),
  ("olmoe", {"router_normalize": True}),
  ("mamba2", {"mamba_dt_max": 0.0}),
  ("mamba2", {"mamba_dt_min": 0.0}),
  ("mamba2", {"mamba_norm_groups": 1}),
  ("bamba", {"rope.fraction": 1.0}),
  ("granitemoehybrid", {"embedding_multiplier": 1.0}),
  ("granitemoehybrid", {"residual_multiplier": 1.0}),
  ("granitemoehybrid", {"logits_multiplier": 1.0}),
  ("granitemoehybrid", {"attention_scale": 0.0}),
  ("granitemoehybrid", {"position": "rope"}),
  ("granitemoehybrid", {"mamba_dt_min": 0.0}),
  ("nemotron_h", {"router_multiplier": 1.0}),
  ("nemotron_h", {"router_normalize": False}),
  ("nemotron_h", {"mamba_dt_min": 0.0}),
]


@pytest.mark.slow  # it tests the fixtures, which stay as they are
@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[f"{name}-{next(iter(change))}" for name, change in CHANGES])
def test_every_key_that_is_imported_matters(name, change):
  fixture = load_fixture(name)
  ((key, value),) = change.items()
  model = fixture.model
  if key.startswith("rope."):
    change = {"rope": dataclasses.replace(model.rope, **{key.removeprefix("rope."): value})}
  changed = compute_logits(dataclasses.replace(model, **change), fixture.params, fixture.tokens)
  assert np.abs(changed - fixture.logits).max() > 50 * TOLERANCE


@pytest.fixture
def copy(tmp_path):
  """Returns (fixture name, change of config.json's values, change of the tensors) -> a directory."""

  def make(name, config=lambda values: None, tensors=lambda named: None):
    directory = tmp_path / name
    shutil.copytree(FIXTURES / name, directory)
    values = json.loads((directory / "config.json").read_text())
    config(values)
    (directory / "config.json").write_text(json.dumps(values))
    named = all_tensors(directory)
    tensors(named)
    save_file(named, directory / "model.safetensors")
    return directory

  return make


def test_missing_and_unknown_tensors_are_listed(copy):
  directory = copy("mixtral", tensors=lambda named: named.pop("model.norm.weight"))
  with pytest.raises(CheckpointError, match=r"lacks 1 tensors: model\.norm\.weight"):
    huggingface.load(directory)
  directory = copy("llama", tensors=lambda named: named.update({"model.layers.0.self_attn.sinks": np.zeros(4, "f4")}))
  with pytest.raises(CheckpointError, match=r"unknown 1 tensors: model\.layers\.0\.self_attn\.sinks"):
    huggingface.load(directory)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(copy):
  directory = copy("llama", config=lambda values: values.update(intermediate_size=48))
  with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \(40, 32\).*\(48, 32\)"):
    huggingface.load(directory)


def test_half_precision_is_read_and_tied_heads_may_be_stored_twice(copy):
  def halve(named):
    named["lm_head.weight"] = named["model.embed_tokens.weight"]
    for name, tensor in named.items():
      named[name] = tensor.astype(np.float16)

  _, params = huggingface.load(copy("llama_v4", tensors=halve))
  fixture = load_fixture("llama_v4")
  np.testing.assert_allclose(params["embedding"]["table"], fixture.params["embedding"]["table"], atol=1e-3)


def test_a_head_that_contradicts_its_tie_is_refused(copy):
  directory = copy("llama_v4", tensors=lambda named: named.update({"lm_head.weight": np.zeros((64, 32), "f4")}))
  with pytest.raises(CheckpointError, match="tie_word_embeddings"):
    huggingface.load(directory)


def test_old_rotary_buffers_are_no_weights(copy):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  huggingface.load(copy("llama", tensors=lambda named: named.update({name: np.zeros(8, "f4")})))


@pytest.mark.parametrize(
  ("name", "change", "words"),
  [
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "longrope"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"model_type": "gpt2"}, "model_type='gpt2' is not one of llama, mistral"),
    ("nemotron_h", {"n_group": 2}, "n_group=2"),
    ("nemotron_h", {"moe_latent_size": 16}, "moe_latent_size=16"),
    ("nemotron_h", {"mlp_bias": True}, "mlp_bias"),
    ("nemotron_h", {"hybrid_override_pattern": "MX"}, "'X'"),
    ("mamba2", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("granitemoehybrid", {"layer_types": ["mamba"]}, "num_hidden_layers=3 and 1"),
    ("qwen3", {"use_sliding_window": False}, "sliding_window=None"),
  ],
)
def test_what_we_do_not_compute_is_refused_in_one_line(copy, name, change, words):
  with pytest.raises(ConfigError, match=words) as caught:
    huggingface.load(copy(name, config=lambda values: values.update(change)))
  assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_opened(copy):
  directory = copy("llama")
  (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
  with pytest.raises(CheckpointError, match="pickled"):
    huggingface.load(directory)


@pytest.mark.parametrize(
  ("changes", "model_type"),
  [
    ({"layers": "(AF)x2"}, "llama"),
    ({"layers": "(LF)x2"}, "mistral"),
    ({"layers": "(AE)x2"}, "mixtral"),
    ({"layers": "LFAF", "attention_bias": "qkv"}, "qwen2"),
    ({"layers": "AFLF", "qk_norm": "head"}, "qwen3"),
    ({"layers": "AFAE", "qk_norm": "head"}, "qwen3_moe"),
    ({"layers": "AE", "qk_norm": "all"}, "olmoe"),
    ({"layers": "MM", "mamba_norm_groups": 2}, "mamba2"),
    ({"layers": "MAF", "mamba_norm_groups": 2}, "granitemoehybrid"),
    ({"layers": "MAFME", "mamba_norm_groups": 2, "position": "none"}, "granitemoehybrid"),
    ({"layers": "MFA", "mamba_norm_groups": 2, "position": "none", "mlp_activation": "relu2"}, "nemotron_h"),
  ],
)
def test_the_plainest_exact_class_is_chosen(changes, model_type):
  assert huggingface.find_exact(tiny_model(**changes))[0].model_type == model_type


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"layers": "AF", "attention_sinks": True}, "attention_sinks"),
    ({"layers": "MLF", "mamba_norm_groups": 2}, "layer 1 attends to a window"),
    ({"layers": "MAF"}, "mamba_norm_groups=1 would be 2"),
    ({"layers": "ME", "mamba_norm_groups": 2, "router": "sigmoid"}, "router='sigmoid'"),
    ({"layers": "MFF", "mamba_norm_groups": 2}, r"layer 2 \(F\) follows"),
    ({"layers": "AF", "logits_soft_cap": 30.0}, "logits_soft_cap=30.0"),
  ],
)
def test_a_model_without_an_exact_class_is_refused_with_the_reason(changes, words):
  with pytest.raises(ConfigError, match=words):
    huggingface.find_exact(tiny_model(**changes))


@pytest.mark.parametrize(
  "changes",
  [
    {"layers": "MMAFMEM", "shared_expert_dim": 0},
    pytest.param({"layers": "MMAFMEM", "shared_expert_dim": 20}, marks=pytest.mark.slow),
    {"layers": "AMM", "position": "none"},
    {"layers": "MAE", "residual_multiplier": 0.5, "logits_multiplier": 0.3},
  ],
  ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_added_layers_of_zeros_leave_the_function_as_it_is(changes, tmp_path):
  model = tiny_model(mamba_norm_groups=2, **changes)
  params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  export = huggingface.save(tmp_path, model, params, IDS)
  assert export.family is FAMILIES["granitemoehybrid"]
  assert export.written > export.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
  padded, padded_params = huggingface.load(tmp_path)
  tokens = np.arange(40).reshape(2, 20) % model.vocab_size
  np.testing.assert_allclose(
    compute_logits(padded, padded_params, tokens), compute_logits(model, params, tokens), rtol=0, atol=1e-5
  )


def test_weights_over_the_size_of_a_file_are_written_in_several(tmp_path, monkeypatch):
  monkeypatch.setattr("ultrathink_jax.interop.shards.MAX_FILE_BYTES", 30_000)
  fixture = load_fixture("mixtral")
  huggingface.save(tmp_path, fixture.model, fixture.params, IDS)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  files = set(index["weight_map"].values())
  assert len(files) > 2
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_tensors(tmp_path).values())
  assert all(sum(t.nbytes for t in load_file(tmp_path / name).values()) <= 30_000 for name in files)
  _, params = huggingface.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, fixture.params)
