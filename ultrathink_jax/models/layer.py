"""The alphabet of the layer pattern, and the residual layer and period that are made of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ultrathink_jax import patterns
from ultrathink_jax.config import ModelConfig
from ultrathink_jax.kernels.attention import Scoring
from ultrathink_jax.layers import attention, mamba
from ultrathink_jax.layers.attention import Attention, AttentionConfig
from ultrathink_jax.layers.mamba import Mamba, MambaConfig
from ultrathink_jax.layers.mlp import Mlp, MlpConfig
from ultrathink_jax.layers.moe import Moe, MoeConfig
from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.layers.router import RouterConfig
from ultrathink_jax.types import Context

LAYER_OUTPUT = "layer_output"  # what a layer adds to the residual stream, by which remat policies know it


def groups(model: ModelConfig) -> tuple[patterns.Group, ...]:
  """Returns the groups of the model's pattern, every letter of which is in MIXERS."""
  return patterns.parse(model.layers, "".join(MIXERS))


def _out_scale(model: ModelConfig) -> float:
  """Residual layers start smaller in deep models, so that their sum does not grow (Radford et al., 2019)."""
  return len(patterns.spell(groups(model))) ** -0.5


def _attention(model: ModelConfig, window_tokens: int | None = None) -> AttentionConfig:
  scale = model.attention_scale or model.head_dim**-0.5
  return AttentionConfig(
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads,
    head_dim=model.head_dim,
    rope=model.rope if model.position == "rope" else None,
    qk_norm=model.qk_norm,
    qkv_clip=model.qkv_clip,
    bias=model.attention_bias,
    has_sinks=model.attention_sinks,
    scoring=Scoring(scale, model.attention_soft_cap or None, window_tokens),
    backend=model.attention_backend,
    norm_epsilon=model.norm_epsilon,
    out_scale=_out_scale(model),
  )


def _window(model: ModelConfig) -> AttentionConfig:
  return _attention(model, model.window_tokens)


def _mamba(model: ModelConfig) -> MambaConfig:
  return MambaConfig(
    num_heads=model.mamba_heads,
    head_dim=model.mamba_head_dim,
    num_groups=model.mamba_num_groups,
    state_dim=model.mamba_state_dim,
    conv_width=model.mamba_conv_width,
    chunk_tokens=model.mamba_chunk_tokens,
    norm_groups=model.mamba_norm_groups,
    has_bias=model.mamba_bias,
    has_conv_bias=model.mamba_conv_bias,
    dt_limits=(model.mamba_dt_min, model.mamba_dt_max or None),
    backend=model.ssd_backend,
    norm_epsilon=model.norm_epsilon,
    out_scale=_out_scale(model),
  )


def _mlp(model: ModelConfig) -> MlpConfig:
  return MlpConfig(model.mlp_dim, model.mlp_activation, model.mlp_bias, _out_scale(model))


def _moe(model: ModelConfig) -> MoeConfig:
  return MoeConfig(
    num_experts=model.num_experts,
    expert_dim=model.expert_dim,
    shared_dim=model.shared_expert_dim,
    activation=model.mlp_activation,
    capacity_factor=model.capacity_factor,
    buffer_factor=model.expert_buffer_factor,
    chunks=model.expert_chunks,
    router=RouterConfig(
      name=model.router,
      experts_per_token=model.experts_per_token,
      normalize=model.router_normalize,
      multiplier=model.router_multiplier,
      has_bias=model.router_bias,
      group_sizes=tuple(model.expert_group_sizes.values()),
    ),
    backend=model.experts_backend,
    out_scale=_out_scale(model),
  )


class Mixer(NamedTuple):
  """What a letter stands for.

  Attributes:
    name: of the layer in parameter paths.
    module: ModelConfig -> module with `__call__(x, context, cache) -> (y, cache, aux)`.
    init_cache: (ModelConfig, batch size, document length, dtype) -> the cache of one layer, or None.
  """

  name: str
  module: Callable[[ModelConfig], nn.Module]
  init_cache: Callable[[ModelConfig, int, int, Any], Any]


def _no_cache(model: ModelConfig, batch_size: int, length: int, dtype: Any) -> None:
  return None


MIXERS: dict[str, Mixer] = {
  "A": Mixer(
    "attention", lambda m: Attention(_attention(m)), lambda m, *sizes: attention.init_cache(_attention(m), *sizes)
  ),
  "L": Mixer("window", lambda m: Attention(_window(m)), lambda m, *sizes: attention.init_cache(_window(m), *sizes)),
  "M": Mixer("mamba", lambda m: Mamba(_mamba(m)), lambda m, batch, _, dtype: mamba.init_cache(_mamba(m), batch, dtype)),
  "F": Mixer("mlp", lambda m: Mlp(_mlp(m)), _no_cache),
  "E": Mixer("moe", lambda m: Moe(_moe(m)), _no_cache),
}


def layer_names(letters: str) -> list[str]:
  """Returns the name of each layer of a period: what it is and its place, as in mamba_0, attention_1, mlp_2."""
  return [f"{MIXERS[letter].name}_{place}" for place, letter in enumerate(letters)]


def layer_paths(model: ModelConfig) -> list[tuple[int, str, int]]:
  """Returns (number in the whole model, parameter path, repeat) of every layer, first to last."""
  paths = []
  for index, group in enumerate(groups(model)):
    for repeat in range(group.repeats):
      paths += [(f"group_{index}/{name}", repeat) for name in layer_names(group.letters)]
  return [(number, *path) for number, path in enumerate(paths)]


class Layer(nn.Module):
  """x + residual_multiplier * mixer(norm(x))."""

  letter: str
  model: ModelConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: Any
  ) -> tuple[Float[Array, "B T D"], Any, dict[str, Array]]:
    mixer = MIXERS[self.letter]
    with jax.named_scope(mixer.name):
      normed = RMSNorm(self.model.norm_epsilon, name="norm")(x)
      y, cache, aux = mixer.module(self.model).copy(name="mixer")(normed, context, cache)
    if self.model.residual_multiplier != 1:
      y *= self.model.residual_multiplier
    return x + checkpoint_name(y, LAYER_OUTPUT), cache, aux


class Period(nn.Module):
  """The layers spelled by `letters`, one after another; the body of the scan over a group."""

  letters: str
  model: ModelConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], caches: Any, context: Context
  ) -> tuple[Float[Array, "B T D"], tuple[Any, dict[str, Any], dict[str, Array]]]:
    """Returns x and, keyed by layer name, the caches, the aux values of layers that have any, and the taps."""
    new_caches, aux, taps = {}, {}, {}
    for name, letter in zip(layer_names(self.letters), self.letters, strict=True):
      cache = None if caches is None else caches[name]
      x, new_caches[name], layer_aux = Layer(letter, self.model, name=name)(x, context, cache)
      if layer_aux:
        aux[name] = layer_aux
      taps[name] = x
    return x, (None if caches is None else new_caches, aux, taps)
