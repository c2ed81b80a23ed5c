"""Bamba and GraniteMoeHybrid: layers of Mamba-2 or attention, each with a feed-forward part.

GraniteMoeHybrid adds experts beside a feed-forward layer that every token passes, and multipliers.
"""

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import keys, rows
from ultrathink_jax.interop.families.family import Family
from ultrathink_jax.interop.families.keys import Values
from ultrathink_jax.interop.families.pattern import letters_of

_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "A", "attention": "A"}
_MIXERS = {
  "A": rows.norm("input_layernorm") + rows.attention("self_attn"),
  "M": rows.norm("input_layernorm") + rows.mamba("mamba"),
}
_MULTIPLIER_DIGITS = 12  # so that 1 / (1 / x) is x again


def _read_mixers(values: Values) -> Values:
  keys.require(values, hidden_act="silu")
  num_groups = keys.get(values, "mamba_n_groups", 1)
  num_heads, expand = keys.get(values, "mamba_n_heads", 128), keys.get(values, "mamba_expand", 2)
  inner = expand * keys.get(values, "hidden_size")
  head_dim = keys.get(values, "mamba_d_head", "auto")
  if head_dim == "auto":
    head_dim = inner // num_heads
  if num_heads * head_dim != inner:
    raise ConfigError("config.json: mamba_n_heads * mamba_d_head is not mamba_expand * hidden_size")
  return {
    **keys.read_attention(values, has_head_dim=False),
    **keys.read_bias(values),
    **keys.read_gated(values),
    **keys.read_time_step_limit(values),
    "mamba_state_dim": keys.get(values, "mamba_d_state", 256),
    "mamba_conv_width": keys.get(values, "mamba_d_conv", 4),
    "mamba_expand": expand,
    "mamba_num_heads": num_heads,
    "mamba_head_dim": head_dim,
    "mamba_num_groups": num_groups,
    "mamba_norm_groups": num_groups,
    "mamba_bias": keys.get(values, "mamba_proj_bias", False),
    "mamba_conv_bias": keys.get(values, "mamba_conv_bias", True),
    "mamba_chunk_tokens": keys.get(values, "mamba_chunk_size", 256),
  }


def _write_mixers(model: ModelConfig) -> Values:
  return {
    **keys.write_common(model),
    **keys.write_attention(model, has_head_dim=False),
    **keys.write_bias(model),
    **keys.write_activation(model),
    **keys.write_rope(model),
    **keys.write_time_step_limit(model),
    "num_hidden_layers": len(letters_of(model)) // 2,
    "mamba_d_state": model.mamba_state_dim,
    "mamba_d_conv": model.mamba_conv_width,
    "mamba_expand": keys.mamba_expand(model),
    "mamba_n_heads": model.mamba_heads,
    "mamba_d_head": model.mamba_head_dim,
    "mamba_n_groups": model.mamba_num_groups,
    "mamba_proj_bias": model.mamba_bias,
    "mamba_conv_bias": model.mamba_conv_bias,
    "mamba_chunk_size": model.mamba_chunk_tokens,
  }


def _read_bamba(values: Values) -> Values:
  attention = set(values.get("attn_layer_indices") or ())
  count = keys.layer_count(values, None)
  return {
    **keys.read_common(values, epsilon=1e-5),
    **_read_mixers(values),
    **keys.read_rope(values, fraction=0.5),
    "layers": "".join("AF" if layer in attention else "MF" for layer in range(count)),
    "mlp_dim": keys.get(values, "intermediate_size", 14336),
    "mlp_bias": keys.get(values, "mlp_bias", False),
  }


def _write_bamba(model: ModelConfig) -> Values:
  if model.rope.fraction != 0.5:
    raise ConfigError(f"model.rope.fraction={model.rope.fraction}, and Bamba turns half of each head")
  return {
    **_write_mixers(model),
    "attn_layer_indices": [layer for layer, letter in enumerate(letters_of(model)[::2]) if letter == "A"],
    "intermediate_size": model.mlp_dim,
    "mlp_bias": model.mlp_bias,
  }


def _read_granite(values: Values) -> Values:
  keys.require(values, normalization_function="rmsnorm", partial_rotary_factor=1.0)
  count = keys.get(values, "num_hidden_layers")
  kinds = values.get("layer_types") or values.get("layers_block_type") or ["linear_attention"] * count
  keys.layer_count(values, kinds)
  if unknown := set(kinds) - _KINDS.keys():
    raise ConfigError(f"config.json: layer types {sorted(unknown)} are not of {', '.join(_KINDS)}")
  num_experts = keys.get(values, "num_local_experts", 8)
  shared_dim = keys.get(values, "shared_intermediate_size", 1024)
  feed_forward = "E" if num_experts else "F"
  read = {
    **keys.read_common(values),
    **_read_mixers(values),
    **keys.read_rope(values),
    "layers": "".join(_KINDS[kind] + feed_forward for kind in kinds),
    "embedding_multiplier": float(keys.get(values, "embedding_multiplier", 1.0)),
    "residual_multiplier": float(keys.get(values, "residual_multiplier", 1.0)),
    "logits_multiplier": 1 / keys.get(values, "logits_scaling", 1.0),
    "attention_scale": float(keys.get(values, "attention_multiplier", 1.0)),
  }
  if values.get("position_embedding_type") != "rope":
    read["position"] = "none"
  if not num_experts:
    return read | {"mlp_dim": shared_dim}
  return read | {
    "num_experts": num_experts,
    "experts_per_token": keys.get(values, "num_experts_per_tok", 2),
    "expert_dim": keys.get(values, "intermediate_size"),
    "shared_expert_dim": shared_dim,
  }


def _write_granite(model: ModelConfig) -> Values:
  has_experts = "E" in letters_of(model)
  if has_experts and not model.shared_expert_dim:
    raise ConfigError("model.shared_expert_dim=0, and GraniteMoeHybrid has a shared expert in every layer")
  kinds = {"M": "mamba", "A": "attention"}  # the older names: both versions read them
  mixers = letters_of(model)[::2]
  if not set(mixers) <= kinds.keys():
    raise ConfigError("every other layer is neither A nor M")
  return {
    **_write_mixers(model),
    "layer_types": [kinds[letter] for letter in mixers],
    "embedding_multiplier": model.embedding_multiplier,
    "residual_multiplier": model.residual_multiplier,
    "logits_scaling": float(f"{1 / model.logits_multiplier:.{_MULTIPLIER_DIGITS}g}"),
    "attention_multiplier": model.attention_scale or model.head_dim**-0.5,
    "position_embedding_type": "rope" if model.position == "rope" else None,
    "num_local_experts": model.num_experts if has_experts else 0,
    "num_experts_per_tok": model.experts_per_token if has_experts else 0,
    "intermediate_size": model.expert_dim if has_experts else model.mlp_dim,
    "shared_intermediate_size": model.shared_expert_dim if has_experts else model.mlp_dim,
  }


BAMBA = Family(
  "bamba",
  "BambaForCausalLM",
  _read_bamba,
  _write_bamba,
  "model.layers.{}",
  rows.outside("model.embed_tokens", "model.final_layernorm"),
  _MIXERS | {"F": rows.norm("pre_ff_layernorm") + rows.feed_forward("feed_forward")},
)
GRANITE = Family(
  "granitemoehybrid",
  "GraniteMoeHybridForCausalLM",
  _read_granite,
  _write_granite,
  "model.layers.{}",
  rows.outside("model.embed_tokens", "model.norm"),
  _MIXERS
  | {
    "F": rows.norm("post_attention_layernorm") + rows.joined_feed_forward("shared_mlp", "mixer"),
    "E": rows.norm("post_attention_layernorm")
    + rows.joined_feed_forward("shared_mlp", "mixer.shared")
    + rows.router("block_sparse_moe.router.layer")
    + rows.fused_experts("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
  },
  renames=(
    (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
    (r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
    (r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),
  ),
)
