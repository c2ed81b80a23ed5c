"""Attention over packed rows, one block of queries at a time: scores that no query can see are never computed.

The backward pass recomputes each block's scores from the saved log normalisers, so memory is linear in T.

Source: arXiv:2205.14135 (saved normalisers, recomputed scores).
Letters: B batch  T query length  S key length  t queries of a block  s keys of a block  N query heads  K kv heads
G = N/K  M = G t  H head dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.attention import Scoring, visible
from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.matmul import transposed
from ultrathink_jax.kernels.names import KERNEL_OUTPUT
from ultrathink_jax.kernels.soft_cap import soft_cap, through_soft_cap
from ultrathink_jax.platform import is_one_cpu

_BLOCK_TOKENS = 128
_MAX_BLOCKS = 16
_HIDDEN_SCORE = -1e30  # of a key that is not visible; finite, so that padding rows stay finite


def attention_blockwise(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  query_positions: Int[Array, "B T"],
  key_positions: Int[Array, "B S"],
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B S"],
  scoring: Scoring,
  sinks: Float[Array, " N"] | None = None,
  start: int = 0,
) -> Float[Array, "B T N H"]:
  """Returns what `attention` does for rows in document order: query i is token start + i and sees no key behind it."""
  B, T, N, H = query.shape
  K = key.shape[2]
  heads_first = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * jnp.asarray(scoring.scale, query.dtype)
  where = (query_positions, key_positions, query_segments, key_segments)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(K, N // K, 1, 1)
  out = _attend(heads_first, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), sinks, where, scoring, start)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _blocks(T: int, start: int, window_tokens: int | None) -> list[tuple[slice, slice]]:
  """Returns the queries of each block and the keys that any of them can see."""
  block = max(_BLOCK_TOKENS, -(-T // _MAX_BLOCKS))
  first_key = lambda token: 0 if window_tokens is None else max(0, token - window_tokens + 1)
  queries = [slice(first, min(first + block, T)) for first in range(0, T, block)]
  return [(block, slice(first_key(start + block.start), start + block.stop)) for block in queries]


def _bias(where, queries: slice, keys: slice, window_tokens: int | None) -> Float[Array, "B t s"]:
  """Returns 0 where a query sees a key, and elsewhere what hides a score; an array of its own, which all heads read."""
  query_positions, key_positions, query_segments, key_segments = where
  bias = lambda *where: jnp.where(visible(*where, window_tokens), 0, _HIDDEN_SCORE)
  positions = query_positions[:, queries], key_positions[:, keys]
  return materialized(bias, *positions, query_segments[:, queries], key_segments[:, keys])


def _product(spec: str, x: Array, y: Array) -> Array:
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _merge(rows: Float[Array, "B K G t _"]) -> Float[Array, "B K M _"]:
  """Returns the query heads of a group one after another: they share their keys."""
  B, K, G, t, _ = rows.shape
  return rows.reshape(B, K, G * t, -1)


def _by_head(spec: str, rows: Float[Array, "B K G t _"], other: Array) -> Float[Array, "B K G t _"]:
  """Returns one plain matrix product per kv head."""
  return _product(spec, _merge(rows), other).reshape(*rows.shape[:4], -1)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, sinks, where, scoring: Scoring, start: int) -> Float[Array, "B K G T H"]:
  return _attend_forward(query, key, value, sinks, where, scoring, start)[0]


def _attend_forward(query, key, value, sinks, where, scoring: Scoring, start: int):
  outs, log_normalizers = [], []
  for queries, keys in _blocks(query.shape[3], start, scoring.window_tokens):
    scores = soft_cap(_by_head("bkmh,bksh->bkms", query[:, :, :, queries], key[:, :, keys]), scoring.soft_cap)
    scores += _bias(where, queries, keys, scoring.window_tokens)[:, None, None]
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
      highest = jnp.maximum(highest, sinks)
    weights = jnp.exp(scores - highest)
    normalizer = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
      normalizer += jnp.exp(sinks - highest)
    mixed = _by_head("bkms,bksh->bkmh", weights.astype(value.dtype), value[:, :, keys])
    is_token = where[2][:, None, None, queries, None] != 0
    outs.append(jnp.where(is_token, mixed / normalizer, 0).astype(query.dtype))
    # Of a query that sees nothing it is 0, so that the backward pass finds no weight for what is hidden.
    log_normalizer = lambda *sums: jnp.where(sums[0], sums[1] + jnp.log(sums[2]), 0)
    log_normalizers.append(materialized(log_normalizer, is_token, highest, normalizer))
  out, log_normalizer = jnp.concatenate(outs, axis=3), jnp.concatenate(log_normalizers, axis=3)
  out, log_normalizer = (checkpoint_name(array, KERNEL_OUTPUT) for array in (out, log_normalizer))
  return out, (query, key, value, sinks, where, out, log_normalizer)


def _attend_backward(scoring: Scoring, start: int, residuals, out_gradient):
  query, key, value, sinks, where, out, log_normalizer = residuals
  dtype = query.dtype
  # Of each query, what its weights take from one another: sum of weight * gradient of weight.
  means = jnp.sum(out_gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
  query_gradients = []
  key_gradient, value_gradient = (jnp.zeros(array.shape, jnp.float32) for array in (key, value))
  for queries, keys in _blocks(query.shape[3], start, scoring.window_tokens):
    q, d, z, mean = (_merge(array[:, :, :, queries]) for array in (query, out_gradient, log_normalizer, means))
    k, v = key[:, :, keys], value[:, :, keys]
    keys_first = lambda bias: jnp.tile(bias.swapaxes(1, 2), query.shape[2])
    bias = materialized(keys_first, _bias(where, queries, keys, scoring.window_tokens))[:, None]  # [B, 1, s, M]
    # Keys first: the gradients of keys and values then need no transposed operand, which is slow on CPU.
    scores = soft_cap(_product("bksh,bkmh->bksm", k, q), scoring.soft_cap)
    weights = jnp.exp(scores + bias - z.swapaxes(2, 3))
    scores_gradient = weights * (_product("bksh,bkmh->bksm", v, d) - mean.swapaxes(2, 3))
    scores_gradient = through_soft_cap(scores_gradient, scores, scoring.soft_cap).astype(dtype)
    gradient = _query_gradient(scores_gradient, k)
    query_gradients.append(gradient.reshape(*query.shape[:3], -1, query.shape[-1]))
    key_gradient = key_gradient.at[:, :, keys].add(_product("bksm,bkmh->bksh", scores_gradient, q))
    value_gradient = value_gradient.at[:, :, keys].add(_product("bksm,bkmh->bksh", weights.astype(dtype), d))
  query_gradient = jnp.concatenate(query_gradients, axis=3)
  sinks_gradient = None
  if sinks is not None:
    is_token = where[2][:, None, None, :, None] != 0
    taken = jnp.where(is_token, jnp.exp(sinks - log_normalizer) * means, 0)
    sinks_gradient = -jnp.sum(taken, axis=(0, 3))[:, :, None]
  return query_gradient, key_gradient.astype(dtype), value_gradient.astype(dtype), sinks_gradient, None


def _query_gradient(scores_gradient: Float[Array, "B K s M"], key: Float[Array, "B K s H"]) -> Float[Array, "B K M H"]:
  dtype = scores_gradient.dtype
  if not is_one_cpu():
    return _product("bksm,bksh->bkmh", scores_gradient, key).astype(dtype)
  # The keys and the result are a fraction of the scores, which would be transposed otherwise.
  return transposed(_product("bkhs,bksm->bkhm", transposed(key), scores_gradient).astype(dtype))


_attend.defvjp(_attend_forward, _attend_backward)
