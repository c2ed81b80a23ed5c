"""Keys of config.json that families share, against ours, both ways.

Both spellings are read: of transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype).
Positions and types are written so that both versions read them.
"""

import math
from typing import Any

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError

Values = dict[str, Any]

ROPE = {
  "theta": 10_000.0,
  "fraction": 1.0,
  "scaling": "none",
  "factor": 1.0,
  "original_tokens": 4096,
  "low_frequency_factor": 1.0,
  "high_frequency_factor": 4.0,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "attention_factor": 0.0,
}

# What our model section says where an architecture has nothing of the kind.
NEUTRAL = {
  "tie_embeddings": False,
  "dtype": "bfloat16",
  "remat": "full",
  "gather_ahead": False,
  "unroll": 0,
  "pipe_micro_batches": 0,
  "norm_epsilon": 1e-6,
  "embedding_multiplier": 1.0,
  "residual_multiplier": 1.0,
  "logits_multiplier": 1.0,
  "logits_soft_cap": 0.0,
  "num_heads": 1,
  "num_kv_heads": 1,
  "head_dim": 64,
  "qk_norm": "none",
  "qkv_clip": 0.0,
  "attention_bias": "none",
  "attention_scale": 0.0,
  "attention_soft_cap": 0.0,
  "attention_sinks": False,
  "attention_backend": "auto",
  "position": "rope",
  "rope": ROPE,
  "window_tokens": 1024,
  "mlp_dim": 1,
  "mlp_activation": "swiglu",
  "mlp_bias": False,
  "num_experts": 1,
  "experts_per_token": 1,
  "expert_dim": 1,
  "shared_expert_dim": 0,
  "capacity_factor": 0.0,
  "expert_buffer_factor": 2.0,
  "expert_chunks": 1,
  "router": "softmax",
  "router_normalize": True,
  "router_multiplier": 1.0,
  "router_bias": False,
  "router_noise": 0.0,
  "router_noise_steps": 0,
  "expert_groups": "",
  "experts_backend": "auto",
  "mamba_state_dim": 64,
  "mamba_conv_width": 4,
  "mamba_expand": 2,
  "mamba_num_heads": 1,
  "mamba_head_dim": 64,
  "mamba_num_groups": 1,
  "mamba_norm_groups": 1,
  "mamba_bias": False,
  "mamba_conv_bias": True,
  "mamba_dt_min": 0.0,
  "mamba_dt_max": 0.0,
  "mamba_chunk_tokens": 128,
  "ssd_backend": "auto",
}

_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
_UNGATED = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}


def get(values: Values, key: str, default: Any = None) -> Any:
  """Returns the value of `key`, or `default` where it is absent or null. Raises ConfigError where that is None too."""
  value = values.get(key)
  value = default if value is None else value
  if value is None:
    raise ConfigError(f"config.json has no {key}; it must be that of a {values.get('model_type')} model")
  return value


def require(values: Values, **allowed: Any) -> None:
  """Raises ConfigError where a key is there with another value than the one we compute."""
  for key, value in allowed.items():
    if values.get(key) not in (None, value):
      raise ConfigError(f"config.json: {key}={values[key]!r} changes the model in a way we do not compute")


def read_common(values: Values, epsilon_key: str = "rms_norm_eps", epsilon: float = 1e-6) -> Values:
  if values.get("quantization_config"):
    raise ConfigError("config.json: quantization_config is set; give the model before quantization")
  dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
  return {
    "vocab_size": get(values, "vocab_size"),
    "embed_dim": get(values, "hidden_size"),
    "tie_embeddings": get(values, "tie_word_embeddings", False),
    "dtype": "bfloat16" if dtype == "bfloat16" else "float32",
    "norm_epsilon": get(values, epsilon_key, epsilon),
  }


def write_common(model: ModelConfig, epsilon_key: str = "rms_norm_eps") -> Values:
  return {
    "vocab_size": model.vocab_size,
    "hidden_size": model.embed_dim,
    "tie_word_embeddings": model.tie_embeddings,
    "torch_dtype": model.dtype,
    epsilon_key: model.norm_epsilon,
    "use_cache": True,
  }


def read_attention(values: Values, has_head_dim: bool = True) -> Values:
  num_heads = get(values, "num_attention_heads")
  head_dim = get(values, "hidden_size") // num_heads
  return {
    "num_heads": num_heads,
    "num_kv_heads": get(values, "num_key_value_heads", num_heads),
    "head_dim": get(values, "head_dim", head_dim) if has_head_dim else head_dim,
  }


def write_attention(model: ModelConfig, has_head_dim: bool = True) -> Values:
  values = {"num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads}
  return values | ({"head_dim": model.head_dim} if has_head_dim else {})


def read_bias(values: Values) -> Values:
  return {"attention_bias": "all" if get(values, "attention_bias", False) else "none"}


def write_bias(model: ModelConfig) -> Values:
  return {"attention_bias": model.attention_bias == "all"}


def read_gated(values: Values, key: str = "hidden_act") -> Values:
  return {"mlp_activation": _activation(values, key, "silu", _GATED)}


def read_ungated(values: Values, key: str) -> Values:
  return {"mlp_activation": _activation(values, key, "relu2", _UNGATED)}


def write_activation(model: ModelConfig, key: str = "hidden_act") -> Values:
  names = {ours: theirs for table in (_UNGATED, _GATED) for theirs, ours in reversed(table.items())}
  return {key: names[model.mlp_activation]}


def _activation(values: Values, key: str, default: str, table: dict[str, str]) -> str:
  name = get(values, key, default)
  if name not in table:
    raise ConfigError(f"config.json: {key}={name!r} is not one of {', '.join(table)}")
  return table[name]


def read_rope(values: Values, theta: float = 10_000.0, fraction: float = 1.0) -> Values:
  """Returns `position` and `rope`; `theta` and `fraction` are the family's where config.json has none."""
  given = values.get("rope_parameters") or values.get("rope_scaling") or {}
  kind = given.get("rope_type") or given.get("type") or "default"
  max_tokens = get(values, "max_position_embeddings", 2048)
  rope: Values = ROPE | {
    "theta": float(given.get("rope_theta") or values.get("rope_theta") or theta),
    "fraction": float(given.get("partial_rotary_factor") or values.get("partial_rotary_factor") or fraction),
    "scaling": {"default": "none"}.get(kind, kind),
    "original_tokens": max_tokens,
  }
  if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
    raise ConfigError(f"config.json: rope type {kind!r} is not one of default, linear, dynamic, yarn, llama3")
  if kind != "default":
    rope["factor"] = float(given.get("factor") or max_tokens / get(given, "original_max_position_embeddings"))
  if kind in ("yarn", "llama3"):
    rope["original_tokens"] = get(given, "original_max_position_embeddings", max_tokens)
  if kind == "linear":
    rope["original_tokens"] = max(1, int(max_tokens / rope["factor"]))
  if kind == "llama3":
    rope["low_frequency_factor"] = float(get(given, "low_freq_factor"))
    rope["high_frequency_factor"] = float(get(given, "high_freq_factor"))
  if kind == "yarn":
    require(given, truncate=True)
    rope |= {
      "beta_fast": float(given.get("beta_fast") or 32),
      "beta_slow": float(given.get("beta_slow") or 1),
      "attention_factor": float(given.get("attention_factor") or _yarn_magnitude(given, rope["factor"])),
    }
  return {"position": "rope", "rope": rope}


def _yarn_magnitude(given: Values, factor: float) -> float:
  """Returns the factor of queries and keys that mscale and mscale_all_dim stand for; 0, the default, without them."""
  scales = given.get("mscale"), given.get("mscale_all_dim")
  if not all(scales) or factor <= 1:
    return 0.0
  over, under = (0.1 * scale * math.log(factor) + 1 for scale in scales)
  return over / under


def write_rope(model: ModelConfig) -> Values:
  """Returns the keys of rotary positions in both spellings, and the context length they stand for."""
  rope = model.rope
  stretched: Values = {}
  if rope.scaling != "none":
    stretched["factor"] = rope.factor
  if rope.scaling in ("yarn", "llama3"):
    stretched["original_max_position_embeddings"] = rope.original_tokens
  if rope.scaling == "llama3":
    stretched |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
  if rope.scaling == "yarn":
    stretched |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    stretched |= {"attention_factor": rope.attention_factor} if rope.attention_factor else {}
  kind = {"none": "default"}.get(rope.scaling, rope.scaling)
  partial = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
  grows = rope.scaling in ("linear", "yarn", "llama3")
  return {
    "max_position_embeddings": round(rope.original_tokens * rope.factor) if grows else rope.original_tokens,
    "rope_parameters": {"rope_type": kind, "rope_theta": rope.theta, **partial, **stretched},
    "rope_theta": rope.theta,
    "rope_scaling": {"rope_type": kind, **stretched} if stretched else None,
    **partial,
  }


def read_time_step_limit(values: Values) -> Values:
  """Returns our limits of the time step; an upper one of infinity is our 0."""
  low, high = (_number(limit) for limit in get(values, "time_step_limit", (0.0, math.inf)))
  return {"mamba_dt_min": low, "mamba_dt_max": 0.0 if math.isinf(high) else high}


def write_time_step_limit(model: ModelConfig) -> Values:
  # The tagged form is what transformers 5 writes for infinity, which JSON lacks.
  high = model.mamba_dt_max or {"__float__": "Infinity"}
  return {"time_step_limit": [model.mamba_dt_min, high]} if (model.mamba_dt_min or model.mamba_dt_max) else {}


def _number(value: Any) -> float:
  if isinstance(value, dict):
    value = value["__float__"]
  return math.inf if value is None else float(value)


def mamba_expand(model: ModelConfig) -> int:
  """Returns inner width / embed dim. Raises ConfigError where that is no integer."""
  inner = model.mamba_heads * model.mamba_head_dim
  if inner % model.embed_dim:
    raise ConfigError(f"{inner} Mamba channels are not a multiple of model.embed_dim={model.embed_dim}")
  return inner // model.embed_dim


def layer_count(values: Values, kinds: list[str] | None) -> int:
  """Returns num_hidden_layers. Raises ConfigError where a list of layers has another length."""
  count = get(values, "num_hidden_layers", None if kinds is None else len(kinds))
  if kinds is not None and len(kinds) != count:
    raise ConfigError(f"config.json: num_hidden_layers={count} and {len(kinds)} layer types contradict each other")
  return count
