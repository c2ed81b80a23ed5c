"""Qwen2, with biases on query, key and value; Qwen3 and Qwen3-MoE, which norm the queries and keys of each head."""

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import keys, rows
from ultrathink_jax.interop.families.family import Family
from ultrathink_jax.interop.families.keys import Values
from ultrathink_jax.interop.families.llama import OUTSIDE, ROWS, read_dense, read_window, write_dense
from ultrathink_jax.interop.families.pattern import letters_of

_KINDS = {"full_attention": "A", "sliding_attention": "L"}
EXPERTS = (
  rows.norm("post_attention_layernorm")
  + rows.router("mlp.gate")
  + rows.experts("mlp.experts", "gate_proj", "up_proj", "down_proj")
)
FUSED_EXPERTS = (
  rows.norm("post_attention_layernorm")
  + rows.router("mlp.gate")
  + rows.fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
)


def _read_windows(values: Values) -> Values:
  """Returns the keys of layers of which some attend to a window: those listed, or those from a first one on."""
  window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
  kinds = values.get("layer_types")
  count = keys.layer_count(values, kinds)
  if kinds is None:
    first = count if window is None else keys.get(values, "max_window_layers", 28)
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
  if not set(kinds) <= _KINDS.keys() or (window is None and "sliding_attention" in kinds):
    raise ConfigError(f"config.json: layer_types {sorted(set(kinds))} with sliding_window={window} is not a Qwen model")
  layers = {"layers": "".join(_KINDS[kind] + "F" for kind in kinds)}
  return layers | ({"window_tokens": window} if window else {})


def _write_windows(model: ModelConfig) -> Values:
  mixers = letters_of(model)[::2]
  kinds = {letter: kind for kind, letter in _KINDS.items()}
  if not set(mixers) <= kinds.keys():
    raise ConfigError("every other layer is no attention")
  has_window = "L" in mixers
  return {
    "layer_types": [kinds[letter] for letter in mixers],
    "use_sliding_window": has_window,
    "sliding_window": model.window_tokens if has_window else None,
    "max_window_layers": mixers.index("L") if has_window else len(mixers),
  }


def _read_qwen2(values: Values) -> Values:
  return read_dense(values) | _read_windows(values) | {"attention_bias": "qkv"}


def _write_qwen2(model: ModelConfig) -> Values:
  return write_dense(model) | _write_windows(model)


def _read_qwen3(values: Values) -> Values:
  values = {"head_dim": 128} | values
  return read_dense(values) | _read_windows(values) | keys.read_bias(values) | {"qk_norm": "head"}


def _write_qwen3(model: ModelConfig) -> Values:
  return write_dense(model) | _write_windows(model) | keys.write_bias(model)


def read_experts(values: Values) -> Values:
  """Returns the keys of softmax experts that Qwen3-MoE and OLMoE spell alike."""
  return {
    "num_experts": keys.get(values, "num_experts"),
    "experts_per_token": keys.get(values, "num_experts_per_tok", 8),
    "router_normalize": keys.get(values, "norm_topk_prob", False),
  }


def write_experts(model: ModelConfig) -> Values:
  return {
    "num_experts": model.num_experts,
    "num_experts_per_tok": model.experts_per_token,
    "norm_topk_prob": model.router_normalize,
  }


def _read_qwen3_moe(values: Values) -> Values:
  values = ({"num_experts": values["num_local_experts"]} if "num_local_experts" in values else {}) | values
  dense = read_dense(values)
  window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
  step, without = keys.get(values, "decoder_sparse_step", 1), values.get("mlp_only_layers") or []
  is_sparse = lambda layer: layer not in without and (layer + 1) % step == 0
  letters = "".join("AE" if is_sparse(layer) else "AF" for layer in range(keys.layer_count(values, None)))
  return {
    **dense,
    **read_experts(values),
    **keys.read_bias(values),
    **read_window(values, window, letters),
    "qk_norm": "head",
    "expert_dim": keys.get(values, "moe_intermediate_size", 768),
  }


def _write_qwen3_moe(model: ModelConfig) -> Values:
  letters = letters_of(model)
  has_window = "L" in letters
  return {
    **write_dense(model),
    **write_experts(model),
    **keys.write_bias(model),
    "moe_intermediate_size": model.expert_dim,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [layer for layer, letter in enumerate(letters[1::2]) if letter != "E"],
    "use_sliding_window": has_window,
    "sliding_window": model.window_tokens if has_window else None,
  }


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, "model.layers.{}", OUTSIDE, ROWS)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, "model.layers.{}", OUTSIDE, ROWS)
QWEN3_MOE = Family(
  "qwen3_moe",
  "Qwen3MoeForCausalLM",
  _read_qwen3_moe,
  _write_qwen3_moe,
  "model.layers.{}",
  OUTSIDE,
  ROWS | {"E": EXPERTS},
  FUSED_EXPERTS,
)
