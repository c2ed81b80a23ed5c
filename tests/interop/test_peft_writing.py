"""Adapters of ours as files of PEFT: how they are laid out, and what is refused."""

import math
import re
from functools import partial

import numpy as np
import pytest

from tests.conftest import tiny_model
from tests.interop.conftest import load_fixture
from tests.interop.peft_adapters import assert_same, base_of, random_adapter, read_fixture, with_tensors, written
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import FAMILIES
from ultrathink_jax.interop.peft import PeftAdapter, read_adapter, write_adapter
from ultrathink_jax.interop.peft.packing import join, split
from ultrathink_jax.interop.pretrained import unstack
from ultrathink_jax.lora.named import NamedAdapter


@pytest.mark.parametrize("base", ["granitemoehybrid", "nemotron_h", "bamba", "mamba2", "qwen2"])
def test_parts_of_one_matrix_are_joined_and_split_to_the_same_bits(base, tmp_path):
  fixture = load_fixture(base)
  names = r"(?<!mamba\.out)\.kernel" if base in ("nemotron_h", "mamba2") else "."
  adapter = random_adapter(fixture.model, fixture.family, names, is_rslora=True)
  write_adapter(tmp_path, fixture.model, fixture.family, adapter, "fused")
  assert_same(read_adapter(tmp_path, fixture.model, fixture.family), adapter)


def test_the_rank_of_joined_parts_is_their_sum_at_the_same_scale(tmp_path):
  fixture = load_fixture("mamba2")
  adapter = random_adapter(fixture.model, fixture.family, r"mamba\.(x|dt)\.")
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  config, tensors = written(tmp_path)
  assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, ["in_proj"])
  assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}
  assert_same(read_adapter(tmp_path, fixture.model, fixture.family), adapter)


def test_joined_parts_of_other_ranks_and_scales_keep_their_updates():
  normal = np.random.default_rng(0).standard_normal
  make = lambda rank, out, alpha: NamedAdapter(normal((6, rank), np.float32), normal((rank, out), np.float32), alpha)
  parts = {"gate": make(2, 3, 4.0), "x": None, "dt": make(3, 5, 1.5)}
  update = lambda one: one.alpha / one.rank * one.a @ one.b
  whole = join(parts, [3, 4, 5], is_rslora=False)
  assert whole.rank == 5
  expected = np.concatenate([update(parts["gate"]), np.zeros((6, 4)), update(parts["dt"])], -1)
  np.testing.assert_allclose(update(whole), expected, rtol=1e-5)
  gate, x, dt = split(whole, [3, 4, 5], is_rslora=False)
  assert x is None
  assert (gate.rank, dt.rank) == (2, 3)
  np.testing.assert_allclose(update(dt), update(parts["dt"]), rtol=1e-5)


def test_parts_that_read_the_same_ranks_share_one_input_factor(tmp_path):
  base = base_of("granitemoehybrid")
  adapters = read_fixture("granitemoehybrid").adapters
  streams = [adapters[f"layers.0.mamba.{stream}.kernel"] for stream in ("gate", "x", "b", "c", "dt")]
  for stream in streams[1:]:
    np.testing.assert_array_equal(stream.a, streams[0].a)
  write_adapter(tmp_path, base.model, base.family, read_fixture("granitemoehybrid"), "fused")
  assert written(tmp_path)[1]["base_model.model.model.layers.0.mamba.in_proj.lora_A.weight"].shape[0] == 2


def test_experts_are_packed_slowest_in_a_and_fastest_in_b(tmp_path):
  fixture = load_fixture("mixtral")
  adapter = random_adapter(fixture.model, fixture.family, r"moe\.(gate|up|down)\.")
  write_adapter(tmp_path, fixture.model, fixture.family, adapter, "fused")
  config, tensors = written(tmp_path)
  assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
  down = adapter.adapters["layers.3.moe.down.kernel"]
  path = "base_model.model.model.layers.1.mlp.experts"
  rows = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
  for expert in range(4):
    np.testing.assert_array_equal(rows[0][2 * expert : 2 * expert + 2], down.a[expert].T)
    np.testing.assert_array_equal(rows[1][:, expert::4], down.b[expert].T)
  assert tensors[f"{path}.base_layer.lora_A.weight"].shape == (4 * 4, 32)


def test_ranks_and_alphas_that_differ_are_in_patterns(tmp_path):
  fixture = load_fixture("llama")
  adapter = random_adapter(fixture.model, fixture.family, r"attention|mlp")
  change = lambda name, rank, alpha: random_adapter(fixture.model, fixture.family, name, rank, alpha).adapters
  adapter = adapter._replace(adapters=adapter.adapters | change(r"value", 5, 3.0) | change(r"layers\.0.*query", 2, 7.5))
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  config, _ = written(tmp_path)
  assert config["rank_pattern"] == {"v_proj": 5}
  assert config["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 7.5}
  assert_same(read_adapter(tmp_path, fixture.model, fixture.family), adapter)


def test_layers_without_an_adapter_are_no_targets(tmp_path):
  fixture = load_fixture("llama")
  adapter = random_adapter(fixture.model, fixture.family, r"layers\.2\.attention\.query|mlp.up")
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  assert written(tmp_path)[0]["target_modules"] == ["model.layers.1.self_attn.q_proj", "up_proj"]


def test_rslora_of_experts_apart_is_written_with_plain_scales(tmp_path):
  fixture = load_fixture("mixtral")
  adapter = random_adapter(fixture.model, fixture.family, r"moe\.(gate|up|down)|query", rank=4, is_rslora=True)
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  config, _ = written(tmp_path)
  assert (config["use_rslora"], config["lora_alpha"]) == (False, 6)
  for name, one in read_adapter(tmp_path, fixture.model, fixture.family).adapters.items():
    assert one.alpha / 4 == adapter.adapters[name].alpha / math.sqrt(4)
  write_adapter(tmp_path, fixture.model, fixture.family, adapter, "fused")
  assert written(tmp_path)[0]["use_rslora"]


def test_dropout_is_written_but_where_a_parameter_is_adapted(tmp_path):
  fixture = load_fixture("mixtral")
  for names, layout, dropout in [("query", "fused", 0.1), ("router", "per_expert", 0), ("moe", "per_expert", 0)]:
    adapter = random_adapter(fixture.model, fixture.family, names)._replace(dropout=0.1)
    write_adapter(tmp_path, fixture.model, fixture.family, adapter, layout)
    assert written(tmp_path)[0]["lora_dropout"] == dropout


@pytest.mark.parametrize(
  ("base", "options", "layout", "words"),
  [
    (
      "mixtral",
      {"names": r"moe\.(gate|up)\."},
      "per_expert",
      r"only gate, up of gate, up and down.*expert_layout=fused",
    ),
    ("mixtral", {"names": r"moe\.gate\."}, "per_expert", r"layers\.1\.moe: only gate of.*expert_layout=fused"),
    ("granitemoehybrid", {"names": r"moe\.(gate|up|down)\."}, "per_expert", "no module for every.*expert_layout=fused"),
    ("nemotron_h", {"names": r"moe\.(up|down)\."}, "per_expert", "no module for every.*expert_layout=fused"),
    ("mixtral", {"names": r"moe\.(gate|up|down)\.", "has_magnitude": True}, "fused", "no DoRA of experts"),
    ("mixtral", {"names": r"router", "has_magnitude": True}, "per_expert", "no DoRA of experts and routers"),
    ("mamba2", {"names": r"mamba\.x\.", "has_magnitude": True}, "fused", r"gate.*no DoRA magnitude"),
    ("mamba2", {"names": r"mamba\.out\."}, "fused", "no out_proj of Mamba2ForCausalLM"),
  ],
)
def test_what_peft_would_not_compute_is_refused(base, options, layout, words, tmp_path):
  fixture = load_fixture(base)
  with pytest.raises(ConfigError, match=words):
    write_adapter(
      tmp_path, fixture.model, fixture.family, random_adapter(fixture.model, fixture.family, **options), layout
    )
  assert not list(tmp_path.iterdir())


def test_gate_and_up_of_experts_apart_need_one_rank_and_alpha(tmp_path):
  fixture = load_fixture("mixtral")
  make = partial(random_adapter, fixture.model, fixture.family)
  adapter = make(r"moe\.(gate|up|down)\.")
  uneven = adapter._replace(adapters=adapter.adapters | make(r"moe\.up\.", rank=3).adapters)
  with pytest.raises(ConfigError, match=r"\(2, 3\.0\), \(3, 3\.0\).*expert_layout=fused"):
    write_adapter(tmp_path, fixture.model, fixture.family, uneven)
  lower = adapter._replace(adapters=adapter.adapters | make(r"moe\.down\.|query", rank=1).adapters)
  write_adapter(tmp_path, fixture.model, fixture.family, lower)
  config, _ = written(tmp_path)
  assert (config["r"], config["rank_pattern"]) == (2, {"q_proj": 1, "w2": 1, "down_proj": 1})
  assert_same(read_adapter(tmp_path, fixture.model, fixture.family), lower)


def test_parameters_trained_in_full_are_saved_as_whole_modules(tmp_path):
  fixture = load_fixture("llama")
  arrays = {name: np.asarray(array) for name, array in unstack(fixture.model, fixture.params).items()}
  pick = lambda pattern: {name: array for name, array in arrays.items() if re.search(pattern, name)}
  adapter = random_adapter(fixture.model, fixture.family, "query")
  whole = adapter._replace(trained=pick(r"final_norm|embedding\.|layers\.0\.attention\.out\.|layers\.2\.norm"))
  write_adapter(tmp_path, fixture.model, fixture.family, whole)
  assert written(tmp_path)[0]["modules_to_save"] == [
    "embed_tokens", "lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.input_layernorm", "model.norm"
  ]  # fmt: skip
  assert_same(read_adapter(tmp_path, fixture.model, fixture.family), whole)
  part = adapter._replace(trained=pick(r"layers\.0\.attention\.out\.kernel"))
  with pytest.raises(ConfigError, match=r"o_proj\.bias: layers\.0\.attention\.out\.bias is not trained in full"):
    write_adapter(tmp_path, fixture.model, fixture.family, part)


def test_a_trained_table_takes_the_tied_projection_along(tmp_path):
  base = base_of("llama_tied")
  adapter = read_fixture("llama_tied")
  assert list(adapter.trained) == ["embedding.table"]
  write_adapter(tmp_path, base.model, base.family, adapter)
  config, tensors = written(tmp_path)
  assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
  np.testing.assert_array_equal(tensors["base_model.model.lm_head.weight"], adapter.trained["embedding.table"])
  for edit in ({"lm_head": None}, {"embed_tokens": None}, {"lm_head": lambda x: x + 1}):
    with pytest.raises(ConfigError, match="but the model ties them"):
      read_adapter(with_tensors(tmp_path, "llama_tied", edit), base.model, base.family)


def test_an_adapter_without_lora_or_of_unknown_names_is_refused(tmp_path):
  fixture = load_fixture("llama")
  with pytest.raises(ConfigError, match="no LoRA"):
    write_adapter(tmp_path, fixture.model, fixture.family, PeftAdapter({}, {}, False, "", 0.0))
  one = NamedAdapter(np.zeros((32, 2), np.float32), np.zeros((2, 32), np.float32), 1.0)
  for name in ("layers.0.mamba.x.kernel", "embedding.table"):
    with pytest.raises(ConfigError, match=f"{name}: LlamaForCausalLM has no such matrix"):
      write_adapter(tmp_path, fixture.model, fixture.family, PeftAdapter({name: one}, {}, False, "", 0.0))
  with pytest.raises(ConfigError, match=r"q_proj: the adapter maps 32 to 32, and the model 32 to 64"):
    write_adapter(
      tmp_path, fixture.model, fixture.family, PeftAdapter({"layers.0.attention.query.kernel": one}, {}, False, "", 0.0)
    )


def test_a_model_that_is_exported_with_layers_added_has_no_adapter_file(tmp_path):
  model = tiny_model(layers="MMAFME", mamba_norm_groups=2)
  adapter = PeftAdapter({}, {}, False, "", 0.0)
  with pytest.raises(ConfigError, match="merge the adapter and export the whole model"):
    write_adapter(tmp_path, model, FAMILIES["granitemoehybrid"], adapter)
