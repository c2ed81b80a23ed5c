"""What we write, PEFT loads and computes the same with; and what we refuse to write, it would not."""

import json
import re
import warnings

import numpy as np
import pytest

from tests.interop.conftest import FIXTURES, load_fixture
from tests.interop.peft_adapters import (
  ADAPTERS,
  NAMES,
  TOLERANCE,
  base_of,
  compute_logits,
  merge,
  random_adapter,
  read_fixture,
)
from ultrathink_jax.interop.peft import read_adapter, write_adapter, writing
from ultrathink_jax.interop.pretrained import unstack

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = r"moe\.(gate|up|down)\."
LENGTH = 17


def their_logits(base, directory, tokens, allowed="nothing"):
  """Returns logits of PEFT's model; keys of the file that it does not load, or that it lacks, are an error."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    FIXTURES / base.name, dtype=torch.float32, attn_implementation="eager"
  )
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = peft.PeftModel.from_pretrained(model, directory).eval()
  messages = [str(w.message) for w in caught if re.search("unexpected|missing", str(w.message))]
  assert not [message for message in messages if not re.search(allowed, message)]
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens)).long(), use_cache=False).logits.numpy()


def assert_computes_the_same(base, adapter, directory, allowed="nothing"):
  tokens = base.tokens[:, :LENGTH]
  ours = compute_logits(base.model, merge(base.model, base.params, adapter), tokens)
  assert np.abs(ours - base.logits[:, :LENGTH]).max() > 0.1
  np.testing.assert_allclose(their_logits(base, directory, tokens, allowed), ours, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_was_imported_is_exported_for_peft(name, tmp_path):
  base = base_of(name)
  layout = "per_expert" if name == "mixtral_apart" else "fused"
  write_adapter(tmp_path, base.model, base.family, read_fixture(name), layout)
  assert_computes_the_same(base, read_fixture(name), tmp_path)


@pytest.mark.parametrize(
  ("base", "layout", "options"),
  [
    ("mixtral", "per_expert", {"names": "."}),
    ("mixtral", "per_expert", {"names": rf"query|{EXPERTS}", "is_rslora": True}),
    ("mixtral", "per_expert", {"names": r"moe\.down|router"}),
    ("mixtral", "fused", {"names": "."}),
    ("mixtral", "fused", {"names": r"layers\.1\.moe\.(gate|up|router)|layers\.3\.moe\.down", "is_rslora": True}),
    ("mixtral", "fused", {"names": r"moe\.up\."}),
    ("qwen3_moe", "per_expert", {"names": "."}),
    ("qwen3_moe", "per_expert", {"names": r"query|mlp\."}),
    ("qwen3_moe", "fused", {"names": ".", "is_rslora": True}),
    ("olmoe", "per_expert", {"names": "."}),
    ("olmoe", "fused", {"names": "."}),
    ("llama", "fused", {"names": ".", "has_magnitude": True}),
    ("mistral", "fused", {"names": ".", "is_rslora": True}),
    ("qwen2", "fused", {"names": r"layers\.[02]\."}),
    ("qwen3", "fused", {"names": "attention|down", "has_magnitude": True}),
    ("granitemoehybrid", "fused", {"names": "."}),
    ("granitemoehybrid", "fused", {"names": r"mamba\.(x|dt)|shared\.up|moe\.up|router", "is_rslora": True}),
    ("granitemoehybrid_dense", "fused", {"names": ".", "has_magnitude": True}),
    ("bamba", "fused", {"names": ".", "has_magnitude": True}),
    ("bamba", "fused", {"names": r"mamba\.c|out"}),
    ("mamba2", "fused", {"names": r"mamba\.(gate|x|b|c|dt)\."}),
    ("mamba2_tied", "fused", {"names": r"mamba\.(gate|dt)\.", "is_rslora": True}),
    ("nemotron_h", "fused", {"names": r"attention|mlp|moe|mamba\.(x|b)\."}),
    ("nemotron_h_dense", "fused", {"names": r"attention|mlp|mamba\.(gate|x|b|c|dt)\.", "has_magnitude": True}),
  ],
  ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_an_adapter_of_ours_computes_the_same_there(base, layout, options, tmp_path):
  fixture = load_fixture(base)
  adapter = random_adapter(fixture.model, fixture.family, **options)
  write_adapter(tmp_path, fixture.model, fixture.family, adapter, layout)
  assert_computes_the_same(fixture, adapter, tmp_path)


def test_experts_apart_of_one_layer_leave_those_of_others_as_they_are(tmp_path):
  """PEFT makes adapters for all layers, whose second factor is 0, and tells that the file has none for them."""
  fixture = load_fixture("mixtral")
  adapter = random_adapter(fixture.model, fixture.family, r"layers\.3\.moe|layers\.0")
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  assert_computes_the_same(fixture, adapter, tmp_path, allowed=r"missing adapter keys.*layers\.0\.mlp")


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_ranks_and_alphas_of_their_own_are_found_there(layout, tmp_path):
  fixture = load_fixture("mixtral")
  make = lambda names, rank, alpha: random_adapter(fixture.model, fixture.family, names, rank, alpha).adapters
  adapters = make(rf"query|key|out|router|{EXPERTS}", 3, 2.0) | make(r"query|layers\.1\.moe\.down|key", 2, 5.0)
  adapters |= make(r"layers\.0\.attention\.key|router|layers\.3\.moe\.down", 5, 1.5)
  adapter = random_adapter(fixture.model, fixture.family, "query")._replace(adapters=adapters)
  write_adapter(tmp_path, fixture.model, fixture.family, adapter, layout)
  assert_computes_the_same(fixture, adapter, tmp_path)


@pytest.mark.parametrize(
  ("base", "trained"),
  [
    ("mixtral", r"router|unembedding|^embedding|layers\.0\.norm"),
    ("mixtral", r"moe\.(gate|up|down)\."),
    ("llama", r"unembedding|layers\.0\.attention\.query\.|layers\.0\.attention\.out\."),
    ("llama_v4", r"^embedding"),
    ("qwen3_moe", r"query_norm|router|layers\.1\.mlp"),
    ("granitemoehybrid", r"router|mamba\.conv_|layers\.0\.mamba\.norm|shared"),
    ("nemotron_h", r"router|final_norm"),
    ("mamba2_tied", r"^embedding|layers\.0\.mamba\.(conv_|norm)"),
  ],
)
def test_parameters_trained_in_full_are_loaded_there(base, trained, tmp_path):
  fixture = load_fixture(base)
  generator = np.random.default_rng(1)
  arrays = {name: np.asarray(array) for name, array in unstack(fixture.model, fixture.params).items()}
  noisy = lambda array: (array + 0.1 * generator.standard_normal(array.shape)).astype(np.float32)
  names = "mamba.x" if base == "mamba2_tied" else "query"
  adapter = random_adapter(fixture.model, fixture.family, names)._replace(
    trained={name: noisy(array) for name, array in arrays.items() if re.search(trained, name)}
  )
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  assert_computes_the_same(fixture, adapter, tmp_path)


def loses(base, adapter, directory):
  """Returns how far PEFT's logits are from the adapter's, and from those of the base model alone."""
  tokens = base.tokens[:, :LENGTH]
  theirs = their_logits(base, directory, tokens, allowed=".")
  ours = compute_logits(base.model, merge(base.model, base.params, adapter), tokens)
  return np.abs(theirs - ours).max(), np.abs(theirs - base.logits[:, :LENGTH]).max()


def test_gate_and_up_of_experts_apart_without_down_would_be_lost_without_an_error(tmp_path, monkeypatch):
  fixture = load_fixture("mixtral")
  adapter = random_adapter(fixture.model, fixture.family, r"moe\.(gate|up)\.")
  monkeypatch.setattr(writing, "_require_whole_experts", lambda placed: None)
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  lost, effect = loses(fixture, adapter, tmp_path)
  print(f"gate and up apart without down: logits lose {lost:.2f}, effect that is left {effect:.1e}")
  assert lost > 0.1
  assert effect < TOLERANCE


def test_rslora_of_experts_apart_would_be_scaled_wrongly_without_an_error(tmp_path, monkeypatch):
  fixture = load_fixture("mixtral")
  adapter = random_adapter(fixture.model, fixture.family, EXPERTS, is_rslora=True)
  monkeypatch.setattr(writing, "_without_rslora", lambda adapters: adapters)
  write_adapter(tmp_path, fixture.model, fixture.family, adapter)
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
  lost, effect = loses(fixture, adapter, tmp_path)
  print(f"rsLoRA of experts apart: logits are off by {lost:.2f}, of an effect of {effect:.2f}")
  assert lost > 0.05


@pytest.mark.parametrize("values", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_of_experts_would_not_load(values, tmp_path):
  fixture = load_fixture("mixtral")
  write_adapter(
    tmp_path, fixture.model, fixture.family, random_adapter(fixture.model, fixture.family, EXPERTS), "fused"
  )
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  with pytest.raises(ValueError, match="does not work with"):
    their_logits(fixture, tmp_path, fixture.tokens)


def test_an_adapter_of_experts_apart_that_peft_saves_again_is_read(tmp_path):
  base = base_of("mixtral_apart")
  model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / base.name, dtype=torch.float32)
  peft.PeftModel.from_pretrained(model, ADAPTERS / "mixtral_apart").save_pretrained(tmp_path)
  again, adapter = read_adapter(tmp_path, base.model, base.family), read_fixture("mixtral_apart")
  assert again.adapters.keys() == adapter.adapters.keys()
  for name, one in adapter.adapters.items():
    np.testing.assert_array_equal(again.adapters[name].a, one.a)
    np.testing.assert_array_equal(again.adapters[name].b, one.b)
    assert again.adapters[name].alpha == one.alpha
