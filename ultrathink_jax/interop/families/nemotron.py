"""Nemotron-H: one mixer a layer, attention without positions, squared ReLU, experts chosen by sigmoid scores."""

import math

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import keys, rows
from ultrathink_jax.interop.families.family import BANK, FLAT, Family, row
from ultrathink_jax.interop.families.keys import Values
from ultrathink_jax.interop.families.pattern import letters_of

_LETTERS = {"M": "M", "*": "A", "-": "F", "E": "E"}
_KINDS = {
  "linear_attention": "M",
  "mamba": "M",
  "full_attention": "A",
  "attention": "A",
  "mlp": "F",
  "moe": "E",
}
_ROUTER = (
  rows.norm("norm")
  + rows.router("mixer.gate")
  + (row("mixer.gate.e_score_correction_bias", "mixer.router_bias", transform=FLAT),)
  + rows.feed_forward("mixer.shared_experts", "mixer.shared")
)


def _read(values: Values) -> Values:
  keys.require(
    values,
    mamba_hidden_act="silu",
    attention_bias=False,
    sliding_window=0,
    moe_latent_size=0,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    num_nextn_predict_layers=0,
    partial_rotary_factor=1.0,
  )
  letters = _read_letters(values)
  mlp_bias = keys.get(values, "mlp_bias", False)
  if mlp_bias and "E" in letters:
    raise ConfigError("config.json: mlp_bias=True in a model with experts, and our shared expert has no bias")
  num_groups = keys.get(values, "n_groups", 8)
  read = {
    **keys.read_common(values, "layer_norm_epsilon", 1e-5),
    **keys.read_attention({"head_dim": values.get("attention_head_dim") or 128} | values),
    **keys.read_ungated(values, "mlp_hidden_act"),
    "layers": letters,
    "position": "none",
    "mlp_dim": keys.get(values, "intermediate_size", 21504),
    "mlp_bias": mlp_bias,
    "mamba_state_dim": keys.get(values, "ssm_state_size", 128),
    "mamba_conv_width": keys.get(values, "conv_kernel", 4),
    "mamba_expand": keys.get(values, "expand", 2),
    "mamba_num_heads": keys.get(values, "mamba_num_heads", 128),
    "mamba_head_dim": keys.get(values, "mamba_head_dim", 64),
    "mamba_num_groups": num_groups,
    "mamba_norm_groups": num_groups,
    "mamba_bias": keys.get(values, "use_bias", False),
    "mamba_conv_bias": keys.get(values, "use_conv_bias", True),
    # The time step has a lower limit, and no upper one whatever time_step_max says.
    "mamba_dt_min": float(keys.get(values, "time_step_min", 0.001)),
    "mamba_chunk_tokens": keys.get(values, "chunk_size", 128),
  }
  if "E" not in letters:
    return read
  return read | {
    "num_experts": keys.get(values, "n_routed_experts", 8),
    "experts_per_token": keys.get(values, "num_experts_per_tok", 2),
    "expert_dim": keys.get(values, "moe_intermediate_size", 7688),
    "shared_expert_dim": keys.get(values, "moe_shared_expert_intermediate_size", 7688),
    "router": "sigmoid",
    "router_bias": True,
    "router_normalize": keys.get(values, "norm_topk_prob", True),
    "router_multiplier": float(keys.get(values, "routed_scaling_factor", 1.0)),
  }


def _read_letters(values: Values) -> str:
  kinds = values.get("layers_block_type") or values.get("layer_types")
  pattern = values.get("hybrid_override_pattern")
  try:
    if kinds is not None:
      return "".join(_KINDS[kind] for kind in kinds)
    if pattern is not None:
      return "".join(_LETTERS[letter] for letter in pattern)
  except KeyError as error:
    raise ConfigError(f"config.json: {error.args[0]!r} is not a layer of Nemotron-H") from error
  raise ConfigError("config.json has neither layers_block_type nor hybrid_override_pattern")


def _write(model: ModelConfig) -> Values:
  letters = letters_of(model)
  kinds = {"M": "mamba", "A": "attention", "F": "mlp", "E": "moe"}  # the older names: both versions read them
  if not set(letters) <= kinds.keys():
    raise ConfigError("a layer attends to a window")
  if "E" in letters and not (model.shared_expert_dim and model.router_bias):
    raise ConfigError("Nemotron-H has a shared expert and a bias on the choice of experts")
  if model.tie_embeddings:
    raise ConfigError("model.tie_embeddings=True, and Nemotron-H never ties")
  spelled = {ours: theirs for theirs, ours in _LETTERS.items()}
  return {
    **keys.write_common(model, "layer_norm_epsilon"),
    **keys.write_attention(model),
    **keys.write_activation(model, "mlp_hidden_act"),
    "max_position_embeddings": model.rope.original_tokens,
    "layers_block_type": [kinds[letter] for letter in letters],
    "hybrid_override_pattern": "".join(spelled[letter] for letter in letters),
    "num_hidden_layers": len(letters),
    "intermediate_size": model.mlp_dim,
    "mlp_bias": model.mlp_bias,
    "ssm_state_size": model.mamba_state_dim,
    "conv_kernel": model.mamba_conv_width,
    "expand": math.ceil(model.mamba_heads * model.mamba_head_dim / model.embed_dim),
    "mamba_num_heads": model.mamba_heads,
    "mamba_head_dim": model.mamba_head_dim,
    "n_groups": model.mamba_num_groups,
    "use_bias": model.mamba_bias,
    "use_conv_bias": model.mamba_conv_bias,
    "time_step_min": model.mamba_dt_min,
    "chunk_size": model.mamba_chunk_tokens,
    "n_routed_experts": model.num_experts,
    "num_experts_per_tok": model.experts_per_token,
    "moe_intermediate_size": model.expert_dim,
    "moe_shared_expert_intermediate_size": model.shared_expert_dim or model.expert_dim,
    "norm_topk_prob": model.router_normalize,
    "routed_scaling_factor": model.router_multiplier,
    "n_group": 1,
    "topk_group": 1,
  }


NEMOTRON_H = Family(
  "nemotron_h",
  "NemotronHForCausalLM",
  _read,
  _write,
  "backbone.layers.{}",
  rows.outside("backbone.embeddings", "backbone.norm_f"),
  {
    "A": rows.norm("norm") + rows.attention("mixer"),
    "M": rows.norm("norm") + rows.mamba("mixer"),
    "F": rows.norm("norm") + rows.feed_forward("mixer"),
    "E": _ROUTER + rows.experts("mixer.experts", "gate_proj", "up_proj", "down_proj"),
  },
  fused=(
    *_ROUTER,
    row("mixer.experts.up_proj", "mixer.up.kernel", transform=BANK),
    row("mixer.experts.down_proj", "mixer.down.kernel", transform=BANK),
  ),
  renames=((r"^model\.", "backbone."),),
  letters_per_layer=1,
)
