"""Llama, and Mistral, which may attend to a sliding window and has no biases."""

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.interop.families import keys, rows
from ultrathink_jax.interop.families.family import Family
from ultrathink_jax.interop.families.keys import Values
from ultrathink_jax.interop.families.pattern import letters_of

ATTENTION = rows.norm("input_layernorm") + rows.attention("self_attn")
FEED_FORWARD = rows.norm("post_attention_layernorm") + rows.feed_forward("mlp")
OUTSIDE = rows.outside("model.embed_tokens", "model.norm")
ROWS = {"A": ATTENTION, "L": ATTENTION, "F": FEED_FORWARD}


def read_dense(values: Values) -> Values:
  """Returns the keys of a decoder whose layers are all attention and a gated feed-forward layer, without biases."""
  keys.require(values, partial_rotary_factor=1.0)
  return {
    **keys.read_common(values),
    **keys.read_attention(values),
    **keys.read_rope(values),
    **keys.read_gated(values),
    "layers": "AF" * keys.get(values, "num_hidden_layers"),
    "mlp_dim": keys.get(values, "intermediate_size"),
  }


def write_dense(model: ModelConfig) -> Values:
  return {
    **keys.write_common(model),
    **keys.write_attention(model),
    **keys.write_rope(model),
    **keys.write_activation(model),
    "num_hidden_layers": len(letters_of(model)) // 2,
    "intermediate_size": model.mlp_dim,
  }


def read_window(values: Values, window: int | None, letters: str) -> Values:
  """Returns the keys of layers that all attend to the last `window` tokens, or to all where it is None."""
  if window is None:
    return {"layers": letters}
  return {"layers": letters.replace("A", "L"), "window_tokens": window}


def write_window(model: ModelConfig) -> Values:
  return {"sliding_window": model.window_tokens if "L" in letters_of(model) else None}


def _read_llama(values: Values) -> Values:
  return read_dense(values) | keys.read_bias(values) | {"mlp_bias": keys.get(values, "mlp_bias", False)}


def _write_llama(model: ModelConfig) -> Values:
  return write_dense(model) | keys.write_bias(model) | {"mlp_bias": model.mlp_bias}


def _read_mistral(values: Values) -> Values:
  dense = read_dense(values)
  return dense | read_window(values, values.get("sliding_window", 4096), dense["layers"])


def _write_mistral(model: ModelConfig) -> Values:
  return write_dense(model) | write_window(model)


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, "model.layers.{}", OUTSIDE, ROWS)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, "model.layers.{}", OUTSIDE, ROWS)
