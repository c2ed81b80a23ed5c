"""Causal grouped-query attention over the whole document or a sliding window.

Source: arXiv:2305.13245 (grouped queries), arXiv:2010.04245 (QK norm).
Letters: B batch  T query length  S key length  D embed  N query heads  K kv heads  H head dim.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ultrathink_jax.config import RopeConfig
from ultrathink_jax.kernels.attention import Scoring, attention
from ultrathink_jax.kernels.backends import ATTENTION, resolve_attention
from ultrathink_jax.layers.linear import Projection
from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.layers.rope import rotate, rotation
from ultrathink_jax.parallel.context import attention_over_context
from ultrathink_jax.parallel.sharding import on_each_device
from ultrathink_jax.types import Context


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: RopeConfig | None  # None: no positions
  qk_norm: str
  qkv_clip: float
  bias: str
  has_sinks: bool
  scoring: Scoring
  backend: str
  norm_epsilon: float
  out_scale: float  # of the output projection's initial deviation


class KVCache(NamedTuple):
  """Keys and values already seen; slot S holds the token at `positions` or is empty (-1).

  Token p lives in slot p modulo S, so a window's cache of S slots forgets its oldest token by itself.
  """

  keys: Float[Array, "B K S H"]
  values: Float[Array, "B K S H"]
  positions: Int[Array, "B S"]


def init_cache(config: AttentionConfig, batch_size: int, length: int, dtype: Any) -> KVCache:
  """Returns an empty cache for documents of up to `length` tokens."""
  slots = min(length, config.scoring.window_tokens or length)
  shape = (batch_size, config.num_kv_heads, slots, config.head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch_size, slots), -1, jnp.int32))


class Attention(nn.Module):
  config: AttentionConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None
  ) -> tuple[Float[Array, "B T D"], KVCache | None, dict[str, Array]]:
    """Returns the mixed tokens; with a cache, they follow the cached document (one document a row, padding behind)."""
    c = self.config
    kv_dims, kv_axes = (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
    has_bias = c.bias != "none"
    query = Projection((c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), has_bias=has_bias, name="query")(x)
    key = Projection(kv_dims, kv_axes, has_bias=has_bias, name="key")(x)
    value = Projection(kv_dims, kv_axes, has_bias=has_bias, name="value")(x)
    if c.qk_norm != "none":
      axes = lambda heads: ("head_dim",) if c.qk_norm == "head" else (heads, "head_dim")
      query = RMSNorm(c.norm_epsilon, axes("heads"), name="query_norm")(query)
      key = RMSNorm(c.norm_epsilon, axes("kv_heads"), name="key_norm")(key)
    if c.qkv_clip:
      query, key, value = (jnp.clip(array, -c.qkv_clip, c.qkv_clip) for array in (query, key, value))
    if c.rope is not None:
      turn = context.rotation or rotation(context.positions, c.head_dim, c.rope)
      query, key = rotate(query, turn), rotate(key, turn)
    sinks = None
    if c.has_sinks:
      init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
      sinks = self.param("sinks", init, (c.num_heads,), jnp.float32)
    if cache is None:
      attend = partial(_attend, c, resolve_attention(c.backend, c.scoring, c.has_sinks, query.dtype, c.head_dim))
      queries, keys = (("batch", "length", heads, "head_dim") for heads in ("heads", "kv_heads"))
      whole_rows, of_heads = ("batch", None), None if sinks is None else ("heads",)
      in_axes = (queries, keys, keys, whole_rows, whole_rows, of_heads)
      out = on_each_device(attend, in_axes, queries)(query, key, value, context.positions, context.segment_ids, sinks)
    else:
      out, cache = _attend_with_cache(query, key, value, context, cache, c.scoring, sinks)
    to_embed = Projection(x.shape[-1:], ("heads", "head_dim", "embed"), c.out_scale, c.bias == "all", name="out")
    return to_embed(out), cache, {}


def _attend(config: AttentionConfig, backend: str, query, key, value, positions, segment_ids, sinks):
  """Returns the output of the rows, heads and tokens that are here; positions and segment ids are of whole rows."""
  kernel = lambda *arrays: ATTENTION[backend](*arrays[:-1], config.scoring, sinks, arrays[-1])
  return attention_over_context(kernel, query, key, value, positions, segment_ids, config.scoring.window_tokens)


def _attend_with_cache(query, key, value, context: Context, cache: KVCache, scoring: Scoring, sinks):
  """Returns the output and the cache with the new keys in it.

  Several tokens at once may push each other out of a window's cache, so they attend to the old cache and to one
  another before they are stored.
  """
  is_token = context.segment_ids != 0
  new_positions = jnp.where(is_token, context.positions, -1)
  updated = _store(cache, key, value, new_positions)
  if query.shape[1] == 1:
    keys, values = updated.keys.swapaxes(1, 2), updated.values.swapaxes(1, 2)
    key_positions = updated.positions
  else:
    keys = jnp.concatenate([cache.keys.swapaxes(1, 2), key.astype(cache.keys.dtype)], axis=1)
    values = jnp.concatenate([cache.values.swapaxes(1, 2), value.astype(cache.values.dtype)], axis=1)
    key_positions = jnp.concatenate([cache.positions, new_positions], axis=1)
  out = attention(
    query,
    keys.astype(query.dtype),
    values.astype(query.dtype),
    context.positions,
    key_positions,
    is_token.astype(jnp.int32),
    (key_positions >= 0).astype(jnp.int32),
    scoring,
    sinks,
  )
  return out, updated


def _store(cache: KVCache, key, value, new_positions: Int[Array, "B T"]) -> KVCache:
  slots = cache.positions.shape[1]
  last = jnp.max(new_positions, axis=1, keepdims=True)
  is_kept = (new_positions >= 0) & (new_positions > last - slots)
  slot = jnp.where(is_kept, new_positions % slots, slots)  # one past the end: dropped
  row = jnp.arange(slot.shape[0])[:, None]
  put = lambda old, new: old.at[row, :, slot].set(new.astype(old.dtype), mode="drop")
  positions = cache.positions.at[row, slot].set(new_positions, mode="drop")
  return KVCache(put(cache.keys, key), put(cache.values, value), positions)
