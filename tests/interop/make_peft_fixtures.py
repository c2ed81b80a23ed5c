"""Writes tests/fixtures/peft/NAME/: a tiny adapter as PEFT saves it, with the logits that torch computes with it.

    python tests/interop/make_peft_fixtures.py [NAME ...]

Needs torch, transformers and peft 0.21; the tests that read the fixtures need none of them. The base model is another
fixture, its name in base_model_name_or_path. No factor is 0, so that one that is read wrongly moves the logits.

adapter_config.json, adapter_model.safetensors    what PEFT saved
expected.safetensors                              tokens [2, 17], float32 logits [2, 17, V]
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
LENGTH = 17


class Case(NamedTuple):
  """One fixture: its base model, and the LoraConfig. `is_apart`: every expert a module, as of transformers 4."""

  base: str
  config: dict[str, Any]
  is_apart: bool = False


_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
  "mixtral_attention": Case(
    "mixtral",
    {
      "r": 4,
      "lora_alpha": 6,
      "lora_dropout": 0.05,
      "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
      "rank_pattern": {"o_proj": 2, "model.layers.1.self_attn.q_proj": 3},
      "alpha_pattern": {"v_proj": 3},
    },
  ),
  "mixtral_dora": Case(
    "mixtral",
    {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]},
  ),
  "mixtral_converted": Case("mixtral", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "w1", "w2", "w3"]}),
  "mixtral_fused": Case(
    "mixtral_fused",
    {"r": 2, "lora_alpha": 2, "use_rslora": True, "target_modules": ["v_proj"], "target_parameters": _EXPERTS},
  ),
  "mixtral_down": Case("mixtral", {"r": 2, "target_modules": [], "target_parameters": _EXPERTS[1:]}),
  "mixtral_apart": Case(
    "mixtral", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}, is_apart=True
  ),
  "mixtral_router": Case(
    "mixtral",
    {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["k_proj"], "target_parameters": ["gate.weight"]},
  ),
  "mixtral_saved": Case(
    "mixtral", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "gate"]}
  ),
  "llama": Case(
    "llama",
    {
      "r": 2,
      "lora_alpha": 3,
      "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
      "modules_to_save": ["input_layernorm", "v_proj"],
    },
  ),
  "llama_tied": Case(
    "llama_v4",
    {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
  ),
  "granitemoehybrid": Case(
    "granitemoehybrid",
    {
      "r": 2,
      "lora_alpha": 3,
      "target_modules": ["in_proj", "out_proj", "input_linear", "k_proj"],
      "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
    },
  ),
  "nemotron_h": Case(
    "nemotron_h",
    {
      "r": 2,
      "lora_alpha": 3,
      "target_modules": ["in_proj", "o_proj", "up_proj"],
      "target_parameters": ["experts.up_proj", "experts.down_proj", "gate.weight"],
    },
  ),
}


def load_base(name: str) -> torch.nn.Module:
  """Returns the base model of a fixture, in float32."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    FIXTURES / name, dtype=torch.float32, attn_implementation="eager"
  ).eval()


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
  with torch.no_grad():
    return model.eval()(tokens.long(), use_cache=False).logits.float().contiguous()


def _perturb(model: torch.nn.Module, generator: torch.Generator) -> None:
  """Gives every factor, magnitude and module trained in full values that matter."""
  for name, tensor in model.named_parameters():
    noise = torch.randn(tensor.shape, generator=generator)
    if ".lora_A." in name:
      tensor.data = noise * tensor.shape[-1] ** -0.5
    elif ".lora_B." in name:
      tensor.data = 0.5 * noise
    elif "magnitude" in name:
      tensor.data = tensor.data * (1 + 0.2 * noise)
    elif ".modules_to_save." in name:
      tensor.data = tensor.data + 0.1 * noise


def _save_apart(directory: Path, case: Case, model: torch.nn.Module, generator: torch.Generator) -> None:
  """Writes what PEFT wrote when every expert was a module of nn.Linear; PEFT still reads it."""
  rank, base = case.config["r"], model.config
  widths = {"w1": (base.hidden_size, base.intermediate_size), "w3": (base.hidden_size, base.intermediate_size)}
  widths |= {"w2": (base.intermediate_size, base.hidden_size)}
  modules = {}
  for layer in range(base.num_hidden_layers):
    path = f"base_model.model.model.layers.{layer}"
    heads = base.num_attention_heads * (base.hidden_size // base.num_attention_heads)
    modules[f"{path}.self_attn.q_proj"] = (base.hidden_size, heads)
    modules[f"{path}.block_sparse_moe.gate"] = (base.hidden_size, base.num_local_experts)
    for expert in range(base.num_local_experts):
      modules |= {f"{path}.block_sparse_moe.experts.{expert}.{name}": dims for name, dims in widths.items()}
  tensors = {}
  for path, (wide_in, wide_out) in modules.items():
    tensors[f"{path}.lora_A.weight"] = torch.randn(rank, wide_in, generator=generator) * wide_in**-0.5
    tensors[f"{path}.lora_B.weight"] = 0.5 * torch.randn(wide_out, rank, generator=generator)
  directory.mkdir(parents=True)
  save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
  values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", **case.config}
  (directory / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n")


def make(name: str) -> None:
  """Writes the fixture `name` anew."""
  case = CASES[name]
  generator = torch.Generator().manual_seed(sum(name.encode()))
  base = load_base(case.base)
  directory = FIXTURES / "peft" / name
  shutil.rmtree(directory, ignore_errors=True)
  tokens = torch.randint(3, base.config.vocab_size, (2, LENGTH), generator=generator)
  if case.is_apart:
    _save_apart(directory, case, base, generator)
    model = peft.PeftModel.from_pretrained(base, directory)
  else:
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **case.config))
    _perturb(model, generator)
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
  path = directory / "adapter_config.json"
  values = json.loads(path.read_text()) | {"base_model_name_or_path": case.base}
  path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}, indent=2) + "\n")
  logits = logits_of(model, tokens)
  save_file({"tokens": tokens.int(), "logits": logits}, directory / "expected.safetensors")
  again = peft.PeftModel.from_pretrained(load_base(case.base), directory)
  assert torch.equal(logits_of(again, tokens), logits), f"{name}: PEFT reads it otherwise than it wrote it"
  assert (logits - logits_of(load_base(case.base), tokens)).abs().max() > 0.1
  assert load_file(directory / "adapter_model.safetensors").keys()


if __name__ == "__main__":
  for name in sys.argv[1:] or CASES:
    make(name)
