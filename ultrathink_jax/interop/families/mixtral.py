"""Mixtral, and OLMoE, which norms the queries and keys of all heads together and may clip them."""

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.interop.families import keys, rows
from ultrathink_jax.interop.families.family import Family
from ultrathink_jax.interop.families.keys import Values
from ultrathink_jax.interop.families.llama import ATTENTION, OUTSIDE, read_dense, read_window, write_dense, write_window
from ultrathink_jax.interop.families.pattern import letters_of
from ultrathink_jax.interop.families.qwen import EXPERTS, FUSED_EXPERTS, read_experts, write_experts

_NORM_AND_ROUTER = rows.norm("post_attention_layernorm") + rows.router("block_sparse_moe.gate")
_ROWS = {
  "A": ATTENTION,
  "L": ATTENTION,
  "E": _NORM_AND_ROUTER + rows.experts("block_sparse_moe.experts", "w1", "w3", "w2"),
}
# transformers 5 keeps the fused form in memory, under mlp; its files have either.
_FUSED = _NORM_AND_ROUTER + rows.fused_experts(
  "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"
)


def _read_mixtral(values: Values) -> Values:
  values = {"rope_theta": 1e6} | values
  return {
    **read_dense(values | {"intermediate_size": 1}),
    **keys.read_common(values, epsilon=1e-5),
    **read_window(values, values.get("sliding_window"), "AE" * keys.get(values, "num_hidden_layers")),
    "expert_dim": keys.get(values, "intermediate_size"),
    "num_experts": keys.get(values, "num_local_experts", 8),
    "experts_per_token": keys.get(values, "num_experts_per_tok", 2),
  }


def _write_mixtral(model: ModelConfig) -> Values:
  return {
    **write_dense(model),
    **write_window(model),
    "intermediate_size": model.expert_dim,
    "num_local_experts": model.num_experts,
    "num_experts_per_tok": model.experts_per_token,
  }


def _read_olmoe(values: Values) -> Values:
  return {
    **read_dense(values),
    **keys.read_common(values, epsilon=1e-5),
    **keys.read_attention(values, has_head_dim=False),
    **keys.read_bias(values),
    **read_experts({"num_experts": 64} | values),
    "layers": "AE" * keys.get(values, "num_hidden_layers"),
    "expert_dim": keys.get(values, "intermediate_size"),
    "qk_norm": "all",
    "qkv_clip": float(keys.get(values, "clip_qkv", 0.0)),
  }


def _write_olmoe(model: ModelConfig) -> Values:
  values = {
    **write_dense(model),
    **write_experts(model),
    **keys.write_bias(model),
    "num_hidden_layers": len(letters_of(model)) // 2,
    "intermediate_size": model.expert_dim,
    "clip_qkv": model.qkv_clip or None,
  }
  del values["head_dim"]
  return values


MIXTRAL = Family(
  "mixtral",
  "MixtralForCausalLM",
  _read_mixtral,
  _write_mixtral,
  "model.layers.{}",
  OUTSIDE,
  _ROWS,
  _FUSED,
  renames=((r"\.mlp\.", ".block_sparse_moe."),),
)
OLMOE = Family(
  "olmoe",
  "OlmoeForCausalLM",
  _read_olmoe,
  _write_olmoe,
  "model.layers.{}",
  OUTSIDE,
  {"A": ATTENTION, "E": EXPERTS},
  FUSED_EXPERTS,
)
