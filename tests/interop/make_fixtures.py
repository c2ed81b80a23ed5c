"""Writes tests/fixtures/NAME/: a tiny checkpoint as transformers saves it, with the logits that transformers computes.

    python tests/interop/make_fixtures.py [NAME ...]

Needs torch and transformers 5.23; the tests that read the fixtures need neither. Weights are far from their first
values (norms from 1, biases from 0, state-space constants from their grid), and every case sets several keys away from
their defaults, so that a key or a tensor that is read wrongly moves the logits.

config.json, model.safetensors (or shards with an index)    what transformers saved
expected.safetensors                                        tokens [2, 33] and float32 logits [2, 33, V]
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
LENGTH = 33
VOCAB_SIZE = 64


class Case(NamedTuple):
  """One fixture; `spell_as_v4` rewrites the saved config.json in place to the older spelling."""

  family: str
  config: dict[str, Any]
  save: Mapping[str, Any] = MappingProxyType({})
  dtype: torch.dtype = torch.float32
  spell_as_v4: Callable[[dict[str, Any]], None] | None = None


def _rope_as_v4(config: dict[str, Any]) -> None:
  config.pop("layer_types", None)
  rope = config.pop("rope_parameters")
  config["rope_theta"] = rope.pop("rope_theta")
  kind = rope.pop("rope_type")
  config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
  config["torch_dtype"] = config.pop("dtype")


def _pattern_as_v4(config: dict[str, Any]) -> None:
  letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
  config["hybrid_override_pattern"] = "".join(letters[kind] for kind in config.pop("layers_block_type"))
  config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
  config["torch_dtype"] = config.pop("dtype")


_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_DENSE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE} | _ATTENTION
_NO_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_HYBRID_MAMBA = {
  "mamba_n_heads": 4,
  "mamba_d_head": 16,
  "mamba_d_state": 8,
  "mamba_expand": 2,
  "mamba_chunk_size": 8,
}

CASES = {
  "llama": Case(
    "Llama",
    _DENSE
    | {
      "head_dim": 16,
      "attention_bias": True,
      "mlp_bias": True,
      "rms_norm_eps": 1e-2,
      "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
      },
    },
  ),
  "llama_v4": Case(
    "Llama",
    _DENSE
    | {
      "tie_word_embeddings": True,
      "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    },
    dtype=torch.bfloat16,
    spell_as_v4=_rope_as_v4,
  ),
  "mistral": Case(
    "Mistral",
    _DENSE
    | {
      "sliding_window": 7,
      "head_dim": 12,
      "max_position_embeddings": 512,
      "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 8.0,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "original_max_position_embeddings": 64,
      },
    },
  ),
  "mixtral": Case(
    "Mixtral",
    _DENSE
    | {
      "intermediate_size": 24,
      "num_local_experts": 4,
      "num_experts_per_tok": 2,
      "sliding_window": 9,
      "rope_parameters": {"rope_type": "default", "rope_theta": 200.0},
    },
    spell_as_v4=_rope_as_v4,
  ),
  "mixtral_fused": Case(
    "Mixtral",
    _DENSE | {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 10},
    save={"save_original_format": False},
  ),
  "qwen2": Case(
    "Qwen2",
    _DENSE
    | {
      "num_hidden_layers": 3,
      "tie_word_embeddings": True,
      "use_sliding_window": True,
      "sliding_window": 6,
      "max_window_layers": 1,
      "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    },
    spell_as_v4=_rope_as_v4,
  ),
  "qwen3": Case(
    "Qwen3",
    _DENSE
    | {
      "head_dim": 12,
      "attention_bias": True,
      "max_position_embeddings": 12,
      "use_sliding_window": True,
      "sliding_window": 10,
      "layer_types": ["sliding_attention", "full_attention"],
      "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0},
    },
    save={"max_shard_size": "40KB"},
  ),
  "qwen3_moe": Case(
    "Qwen3Moe",
    _DENSE
    | {
      "num_hidden_layers": 4,
      "num_experts": 4,
      "num_experts_per_tok": 2,
      "moe_intermediate_size": 12,
      "intermediate_size": 24,
      "head_dim": 8,
      "decoder_sparse_step": 2,
      "mlp_only_layers": [3],
      "norm_topk_prob": False,
      "use_sliding_window": True,
      "sliding_window": 8,
      "rms_norm_eps": 1e-3,
    },
  ),
  "qwen3_moe_normalized": Case(
    "Qwen3Moe",
    _DENSE
    | {
      "num_experts": 4,
      "num_experts_per_tok": 2,
      "moe_intermediate_size": 16,
      "head_dim": 12,
      "norm_topk_prob": True,
      "attention_bias": True,
      "tie_word_embeddings": True,
    },
    save={"save_original_format": False},
  ),
  "olmoe": Case(
    "Olmoe",
    _DENSE
    | {
      "intermediate_size": 16,
      "num_experts": 6,
      "num_experts_per_tok": 3,
      "clip_qkv": 0.7,
      "norm_topk_prob": False,
      "attention_bias": True,
    },
  ),
  "mamba2": Case(
    "Mamba2",
    {
      "vocab_size": VOCAB_SIZE,
      "hidden_size": 32,
      "num_hidden_layers": 2,
      "num_heads": 4,
      "head_dim": 16,
      "state_size": 8,
      "n_groups": 2,
      "conv_kernel": 3,
      "chunk_size": 8,
      "use_bias": True,
      "use_conv_bias": False,
      "time_step_limit": (0.2, 0.6),
      "layer_norm_epsilon": 1e-3,
    },
  ),
  "mamba2_tied": Case(
    "Mamba2",
    {
      "vocab_size": VOCAB_SIZE,
      "hidden_size": 32,
      "num_hidden_layers": 2,
      "num_heads": 8,
      "head_dim": 12,
      "expand": 3,
      "state_size": 8,
      "n_groups": 1,
      "chunk_size": 16,
      "tie_word_embeddings": True,
    },
  ),
  "bamba": Case(
    "Bamba",
    _DENSE
    | _HYBRID_MAMBA
    | {
      "num_hidden_layers": 3,
      "intermediate_size": 24,
      "attn_layer_indices": [1],
      "mamba_n_groups": 2,
      "mamba_proj_bias": True,
      "attention_bias": True,
      "mlp_bias": True,
      "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
  ),
  "granitemoehybrid": Case(
    "GraniteMoeHybrid",
    _DENSE
    | _HYBRID_MAMBA
    | {
      "num_hidden_layers": 3,
      "layer_types": ["linear_attention", "full_attention", "linear_attention"],
      "intermediate_size": 12,
      "shared_intermediate_size": 20,
      "num_local_experts": 4,
      "num_experts_per_tok": 2,
      "mamba_n_groups": 2,
      "mamba_conv_bias": False,
      "time_step_limit": (0.1, 0.9),
      "embedding_multiplier": 3.0,
      "logits_scaling": 6.0,
      "residual_multiplier": 0.4,
      "attention_multiplier": 0.2,
      "attention_bias": True,
    },
  ),
  "granitemoehybrid_dense": Case(
    "GraniteMoeHybrid",
    _DENSE
    | _HYBRID_MAMBA
    | {
      "layer_types": ["full_attention", "linear_attention"],
      "shared_intermediate_size": 24,
      "num_local_experts": 0,
      "mamba_proj_bias": True,
      "attention_multiplier": 0.5,
      "position_embedding_type": "rope",
      "tie_word_embeddings": True,
      "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
  ),
  "nemotron_h": Case(
    "NemotronH",
    {
      "vocab_size": VOCAB_SIZE,
      "hidden_size": 32,
      "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "head_dim": 12,
      "intermediate_size": 24,
      "mamba_num_heads": 6,
      "mamba_head_dim": 8,
      "n_groups": 2,
      "ssm_state_size": 8,
      "chunk_size": 8,
      "time_step_min": 0.3,
      "n_routed_experts": 4,
      "num_experts_per_tok": 2,
      "moe_intermediate_size": 12,
      "moe_shared_expert_intermediate_size": 16,
      "routed_scaling_factor": 2.5,
      "norm_topk_prob": True,
    },
    spell_as_v4=_pattern_as_v4,
  ),
  "nemotron_h_dense": Case(
    "NemotronH",
    {
      "vocab_size": VOCAB_SIZE,
      "hidden_size": 32,
      "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"],
      "num_attention_heads": 4,
      "num_key_value_heads": 4,
      "head_dim": 8,
      "intermediate_size": 24,
      "mlp_bias": True,
      "use_bias": True,
      "mamba_num_heads": 8,
      "mamba_head_dim": 8,
      "n_groups": 4,
      "ssm_state_size": 8,
      "conv_kernel": 3,
      "use_conv_bias": False,
      "chunk_size": 8,
    },
  ),
}


def _perturb(model: torch.nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
  """Gives every tensor values that matter and `dtype` holds: none stays at 0 or 1, gates are not saturated."""
  normal = lambda tensor: torch.randn(tensor.shape, generator=generator)
  uniform = lambda tensor, low, high: low + (high - low) * torch.rand(tensor.shape, generator=generator)
  for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
    leaf = name.rsplit(".", 1)[-1]
    if "inv_freq" in leaf:
      continue
    if leaf == "dt_bias":
      value = uniform(tensor, -2.0, 0.5)
    elif leaf == "A_log":
      value = torch.log(uniform(tensor, 0.3, 4.0))
    elif leaf == "D" or "norm" in name:
      value = 1 + 0.3 * normal(tensor)
    elif leaf in ("bias", "e_score_correction_bias"):
      value = 0.3 * normal(tensor)
    elif any(part in name for part in ("conv1d", "embed", "lm_head")):
      value = 0.5 * normal(tensor)
    elif "gate.weight" in name or "router" in name:
      value = 0.7 * normal(tensor)
    else:
      value = tensor.shape[-1] ** -0.5 * normal(tensor)
    tensor.data.copy_(value.to(dtype))


def make(name: str) -> None:
  """Writes the fixture `name` anew."""
  case = CASES[name]
  config = getattr(transformers, f"{case.family}Config")(**_NO_SPECIAL, **case.config)
  config._attn_implementation = "eager"
  model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
  generator = torch.Generator().manual_seed(sum(name.encode()))
  _perturb(model, generator, case.dtype)
  tokens = torch.randint(3, VOCAB_SIZE, (2, LENGTH), generator=generator)
  with torch.no_grad():
    logits = model(tokens, use_cache=False).logits.float()
  directory = FIXTURES / name
  shutil.rmtree(directory, ignore_errors=True)
  model.to(case.dtype).save_pretrained(directory, **case.save)
  (directory / "generation_config.json").unlink(missing_ok=True)
  path = directory / "config.json"
  saved = json.loads(path.read_text())
  if case.spell_as_v4:
    case.spell_as_v4(saved)
  path.write_text(json.dumps(saved, indent=2) + "\n")
  save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, directory / "expected.safetensors")


if __name__ == "__main__":
  for name in sys.argv[1:] or CASES:
    make(name)
