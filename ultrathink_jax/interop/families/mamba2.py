"""Mamba-2: every layer a state-space mixer."""

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import keys, rows
from ultrathink_jax.interop.families.family import Family
from ultrathink_jax.interop.families.keys import Values
from ultrathink_jax.interop.families.pattern import letters_of


def _read(values: Values) -> Values:
  keys.require(values, hidden_act="silu")
  num_groups = keys.get(values, "n_groups", 8)
  read = {
    **keys.read_common(values, "layer_norm_epsilon", 1e-5),
    **keys.read_time_step_limit(values),
    "layers": "M" * keys.get(values, "num_hidden_layers"),
    "mamba_state_dim": keys.get(values, "state_size", 128),
    "mamba_conv_width": keys.get(values, "conv_kernel", 4),
    "mamba_expand": keys.get(values, "expand", 2),
    "mamba_num_heads": keys.get(values, "num_heads", 128),
    "mamba_head_dim": keys.get(values, "head_dim", 64),
    "mamba_num_groups": num_groups,
    "mamba_norm_groups": num_groups,
    "mamba_bias": keys.get(values, "use_bias", False),
    "mamba_conv_bias": keys.get(values, "use_conv_bias", True),
    "mamba_chunk_tokens": keys.get(values, "chunk_size", 256),
  }
  if read["mamba_num_heads"] * read["mamba_head_dim"] != read["mamba_expand"] * read["embed_dim"]:
    raise ConfigError("config.json: num_heads * head_dim is not expand * hidden_size")
  return read


def _write(model: ModelConfig) -> Values:
  return {
    **keys.write_common(model, "layer_norm_epsilon"),
    **keys.write_time_step_limit(model),
    "num_hidden_layers": len(letters_of(model)),
    "hidden_act": "silu",
    "state_size": model.mamba_state_dim,
    "conv_kernel": model.mamba_conv_width,
    "expand": keys.mamba_expand(model),
    "num_heads": model.mamba_heads,
    "head_dim": model.mamba_head_dim,
    "n_groups": model.mamba_num_groups,
    "use_bias": model.mamba_bias,
    "use_conv_bias": model.mamba_conv_bias,
    "chunk_size": model.mamba_chunk_tokens,
  }


MAMBA2 = Family(
  "mamba2",
  "Mamba2ForCausalLM",
  _read,
  _write,
  "backbone.layers.{}",
  rows.outside("backbone.embeddings", "backbone.norm_f"),
  {"M": rows.norm("norm") + rows.mamba("mixer")},
  renames=((r"^backbone\.embedding\.", "backbone.embeddings."),),
  letters_per_layer=1,
)
