"""Causal grouped-query attention with rotary positions, over the whole document or a sliding window.

Source: arXiv:2305.13245 (grouped queries), arXiv:2104.09864 (RoPE), arXiv:2010.04245 (QK norm).
Letters: B batch  T query length  S key length  D embed  N query heads  K kv heads  H head dim.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.attention import attention
from ultrathink_jax.kernels.attention_blockwise import attention_blockwise
from ultrathink_jax.layers.linear import Projection
from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.layers.rope import rotate
from ultrathink_jax.types import Context


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  qk_norm: str
  norm_epsilon: float
  out_scale: float  # of the output projection's initial deviation
  window_tokens: int | None = None


class KVCache(NamedTuple):
  """Keys and values already seen; slot S holds the token at `positions` or is empty (-1).

  Token p lives in slot p modulo S, so a window's cache of S slots forgets its oldest token by itself.
  """

  keys: Float[Array, "B S K H"]
  values: Float[Array, "B S K H"]
  positions: Int[Array, "B S"]


def init_cache(config: AttentionConfig, batch_size: int, length: int, dtype: Any) -> KVCache:
  """Returns an empty cache for documents of up to `length` tokens."""
  slots = length if config.window_tokens is None else min(length, config.window_tokens)
  shape = (batch_size, slots, config.num_kv_heads, config.head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(shape[:2], -1, jnp.int32))


class Attention(nn.Module):
  config: AttentionConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None
  ) -> tuple[Float[Array, "B T D"], KVCache | None, dict[str, Array]]:
    """Returns the mixed tokens; with a cache, they follow the cached document (one document a row, padding behind)."""
    c = self.config
    kv_dims, kv_axes = (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
    query = Projection((c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), name="query")(x)
    key = Projection(kv_dims, kv_axes, name="key")(x)
    value = Projection(kv_dims, kv_axes, name="value")(x)
    if c.qk_norm == "rms":
      query = RMSNorm(c.norm_epsilon, ("head_dim",), name="query_norm")(query)
      key = RMSNorm(c.norm_epsilon, ("head_dim",), name="key_norm")(key)
    query = rotate(query, context.positions, c.rope_theta)
    key = rotate(key, context.positions, c.rope_theta)
    positions, segments = context.positions, context.segment_ids
    if cache is None:
      out = attention_blockwise(query, key, value, positions, positions, segments, segments, c.window_tokens)
    else:
      out, cache = _attend_with_cache(query, key, value, context, cache, c.window_tokens)
    y = Projection(x.shape[-1:], ("heads", "head_dim", "embed"), c.out_scale, name="out")(out)
    return y, cache, {}


def _attend_with_cache(query, key, value, context: Context, cache: KVCache, window_tokens: int | None):
  """Returns the output and the cache with the new keys in it.

  Several tokens at once may push each other out of a window's cache, so they attend to the old cache and to one
  another before they are stored.
  """
  is_token = context.segment_ids != 0
  new_positions = jnp.where(is_token, context.positions, -1)
  updated = _store(cache, key, value, new_positions)
  if query.shape[1] == 1:
    keys, values, key_positions = updated.keys, updated.values, updated.positions
  else:
    keys = jnp.concatenate([cache.keys, key.astype(cache.keys.dtype)], axis=1)
    values = jnp.concatenate([cache.values, value.astype(cache.values.dtype)], axis=1)
    key_positions = jnp.concatenate([cache.positions, new_positions], axis=1)
  out = attention(
    query,
    keys.astype(query.dtype),
    values.astype(query.dtype),
    context.positions,
    key_positions,
    is_token.astype(jnp.int32),
    (key_positions >= 0).astype(jnp.int32),
    window_tokens,
  )
  return out, updated


def _store(cache: KVCache, key, value, new_positions: Int[Array, "B T"]) -> KVCache:
  slots = cache.positions.shape[1]
  last = jnp.max(new_positions, axis=1, keepdims=True)
  is_kept = (new_positions >= 0) & (new_positions > last - slots)
  slot = jnp.where(is_kept, new_positions % slots, slots)  # one past the end: dropped
  row = jnp.arange(slot.shape[0])[:, None]
  put = lambda old, new: old.at[row, slot].set(new.astype(old.dtype), mode="drop")
  return KVCache(put(cache.keys, key), put(cache.values, value), put(cache.positions, new_positions))
