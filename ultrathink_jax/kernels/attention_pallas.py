"""Attention over packed rows as Pallas kernels: scores exist one tile at a time, on chip.

A program holds a block of queries and walks over the keys from the start of its first document, or of its window, to
the diagonal. The backward pass recomputes the scores from saved log normalisers: one kernel walks over keys for the
gradient of queries, one over queries for the gradients of keys and values, so that neither needs atomic additions.

Source: arXiv:2205.14135, arXiv:2307.08691 (loop order).
Letters: B batch  T query length  S key length  N query heads  K kv heads  G = N/K  H head dim  C blocks of a row
t queries of a block  s keys of a block.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.attention import Scoring
from ultrathink_jax.kernels.names import KERNEL_OUTPUT
from ultrathink_jax.kernels.pallas_call import on_platform, pallas_call, power_of_two, scalars, whole_rows

_NO_SINK = -1e30  # the score of a sink that takes nothing; finite, so that rows without keys stay finite


class _Tiles(NamedTuple):
  """Block lengths of 16-bit arrays (float32 has half) and, for Triton, warps and pipeline stages."""

  query: int
  key: int
  num_warps: int
  num_stages: int


_FORWARD = {"cpu": _Tiles(16, 16, 0, 0), "cuda": _Tiles(128, 64, 8, 2), "tpu": _Tiles(256, 256, 0, 0)}
_BACKWARD = {"cpu": _Tiles(16, 16, 0, 0), "cuda": _Tiles(64, 64, 8, 2), "tpu": _Tiles(256, 256, 0, 0)}


def attention_pallas(
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
  """Returns what `attention` does for rows whose documents lie one after another, each whole and in order.

  Query i is token start + i; it sees no key behind it. Positions follow from the segment ids of the keys, which are all
  that is read of the four. A TPU core holds the keys and
  values of a row and kv head, and in the backward pass the queries of a row and kv head twice, at once: with heads of
  128 dims, up to about 100,000 queries.
  """
  del query_positions, key_positions, query_segments
  if sinks is None:
    sinks = jnp.full(query.shape[2], _NO_SINK)
  heads_first = (array.swapaxes(1, 2) for array in (query, key, value))
  first = first_keys(key_segments, scoring.window_tokens)[:, start : start + query.shape[1]]
  out = _attend(*heads_first, sinks.astype(jnp.float32), first, scoring, start)
  return out.swapaxes(1, 2)


def first_keys(segment_ids: Int[Array, "B T"], window_tokens: int | None) -> Int[Array, "B T"]:
  """Returns the index of the first key that each query sees; it sees all from there to itself. T for padding."""
  T = segment_ids.shape[1]
  index = jnp.arange(T, dtype=jnp.int32)
  is_start = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  first = jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)
  if window_tokens is not None:
    first = jnp.maximum(first, index - (window_tokens - 1))
  return jnp.where(segment_ids != 0, first, T)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
  query: Float[Array, "B N T H"],
  key: Float[Array, "B K S H"],
  value: Float[Array, "B K S H"],
  sinks: Float[Array, " N"],
  first: Int[Array, "B T"],
  scoring: Scoring,
  start: int,
) -> Float[Array, "B N T H"]:
  return _attend_forward(query, key, value, sinks, first, scoring, start)[0]


def _attend_forward(query, key, value, sinks, first, scoring: Scoring, start: int):
  keys, first_of_keys = _in_reach(first, scoring, start)
  run = lambda platform, *arrays: _run_forward(platform, *arrays, scoring)
  made = on_platform(run, query, key[:, :, keys], value[:, :, keys], sinks, first_of_keys)
  out, log_normalizer = (checkpoint_name(array, KERNEL_OUTPUT) for array in made)
  return out, (query, key, value, sinks, first, out, log_normalizer)


def _attend_backward(scoring: Scoring, start: int, residuals, out_gradient):
  query, key, value, sinks, first, out, log_normalizer = residuals
  # Of each query, what its weights take from one another: sum of weight * gradient of weight.
  # Both rounded, as the kernels read them: a query with one key has no gradient.
  rounded = (_rounded(array) for array in (out_gradient, out))
  means = jnp.sum(math.prod(rounded), axis=-1)
  keys, first_of_keys = _in_reach(first, scoring, start)
  run = lambda platform, *arrays: _run_backward(platform, *arrays, scoring)
  arrays = (query, key[:, :, keys], value[:, :, keys], first_of_keys, out_gradient, log_normalizer, means)
  query_gradient, *gradients = on_platform(run, *arrays)
  behind = key.shape[2] - keys.stop
  gradients = [jnp.pad(array, ((0, 0), (0, 0), (keys.start, behind), (0, 0))) for array in gradients]
  sinks_gradient = -jnp.sum(jnp.exp(sinks[:, None] - log_normalizer) * means, axis=(0, 2))
  return query_gradient, *gradients, sinks_gradient, None


_attend.defvjp(_attend_forward, _attend_backward)


def _rounded(array: Array) -> Float[Array, "..."]:
  """Returns float32 numbers of no more precision than the dtype has, which XLA otherwise may leave them."""
  info = jnp.finfo(array.dtype)
  return jax.lax.reduce_precision(array.astype(jnp.float32), info.nexp, info.nmant)


def _in_reach(first: Int[Array, "B T"], scoring: Scoring, start: int) -> tuple[slice, Int[Array, "B T"]]:
  """Returns the keys that any query can see, the last query's own at their end, and `first` counted from the first.

  Callers keep whole rows of keys for the backward pass, so that it does not matter to them how many are in reach.
  """
  begin = 0 if scoring.window_tokens is None else max(0, start - scoring.window_tokens + 1)
  end = start + first.shape[1]
  return slice(begin, end), jnp.minimum(first - begin, end - begin)


def _run_forward(platform: str, query, key, value, sinks, first, scoring: Scoring):
  """Returns the output and the log of each query's normaliser, a sink's share in it."""
  B, N, T, H = query.shape
  K, S = key.shape[1:3]
  tiles, length, key_length, dim = _fit(_FORWARD[platform], query, key)
  query = _pad(query, length, dim)
  key, value = (_pad(array, key_length, dim) for array in (key, value))
  first = _pad_queries(first, length, S, key_length)
  num_blocks = length // tiles.query
  of_queries = lambda width: pl.BlockSpec((None, None, tiles.query, width), lambda b, n, i: (b, n, i, 0))
  of_keys = whole_rows(platform, (None, None, key_length, dim), lambda b, n, i: (b, jax.lax.div(n, N // K), 0, 0))
  out, log_normalizer = pallas_call(
    partial(_forward_kernel, scoring, S - T, tiles.key),
    platform,
    grid=(B, N, num_blocks),
    in_specs=[
      scalars(platform, (B, num_blocks)),
      scalars(platform, (N,)),
      of_queries(dim),
      of_keys,
      of_keys,
      pl.BlockSpec((None, tiles.query, 1), lambda b, n, i: (b, i, 0)),
    ],
    out_specs=[of_queries(dim), of_queries(1)],
    out_shape=[
      jax.ShapeDtypeStruct(query.shape, query.dtype),
      jax.ShapeDtypeStruct((B, N, length, 1), jnp.float32),
    ],
    num_warps=tiles.num_warps,
    num_stages=tiles.num_stages,
  )(_first_of_blocks(first, tiles.query), sinks, query, key, value, first[..., None])
  return out[:, :, :T, :H], log_normalizer[:, :, :T, 0]


def _forward_kernel(scoring, start, s, block_first, sinks, query, key, value, first, out, log_normalizer):
  b, n, i = (pl.program_id(axis) for axis in range(3))
  t, H = query.shape
  q, first_key = query[...], first[...]
  of_query = start + i * t + jax.lax.broadcasted_iota(jnp.int32, (t, s), 0)
  column = jax.lax.broadcasted_iota(jnp.int32, (t, s), 1)

  def step(j, carry):
    mixed, highest, normalizer = carry
    keys = pl.ds(pl.multiple_of(j * s, s), s)
    scores = _scores(q, key[keys, :], scoring)
    of_key = j * s + column
    scores = jnp.where((of_key >= first_key) & (of_key <= of_query), scores, -jnp.inf)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - new_highest)
    shrink = jnp.exp(highest - new_highest)
    normalizer = normalizer * shrink + jnp.sum(weights, axis=1, keepdims=True)
    v = value[keys, :]
    return mixed * shrink + _dot(weights.astype(v.dtype), v), new_highest, normalizer

  nothing = (jnp.zeros((t, H), jnp.float32), jnp.full((t, 1), sinks[n]), jnp.ones((t, 1), jnp.float32))
  last = jax.lax.div(start + (i + 1) * t + s - 1, s)
  mixed, highest, normalizer = jax.lax.fori_loop(jax.lax.div(block_first[b, i], s), last, step, nothing)
  out[...] = (mixed / normalizer).astype(out.dtype)
  log_normalizer[...] = highest + jnp.log(normalizer)


def _run_backward(platform: str, query, key, value, first, out_gradient, log_normalizer, means, scoring: Scoring):
  B, N, T, H = query.shape
  K, S = key.shape[1:3]
  G = N // K
  tiles, length, key_length, dim = _fit(_BACKWARD[platform], query, key)
  query, out_gradient = (_pad(array, length, dim) for array in (query, out_gradient))
  key, value = (_pad(array, key_length, dim) for array in (key, value))
  first = _pad_queries(first, length, S, key_length)
  log_normalizer, means = (jnp.pad(array, ((0, 0), (0, 0), (0, length - T))) for array in (log_normalizer, means))
  num_query_blocks, num_key_blocks = length // tiles.query, key_length // tiles.key
  block_first = _first_of_blocks(first, tiles.query)
  call = partial(pallas_call, num_warps=tiles.num_warps, num_stages=tiles.num_stages, platform=platform)

  of_queries = lambda width: pl.BlockSpec((None, None, tiles.query, width), lambda b, n, i: (b, n, i, 0))
  all_keys = whole_rows(platform, (None, None, key_length, dim), lambda b, n, i: (b, jax.lax.div(n, G), 0, 0))
  query_gradient = call(
    partial(_query_gradient_kernel, scoring, S - T, tiles.key),
    grid=(B, N, num_query_blocks),
    in_specs=[
      scalars(platform, block_first.shape),
      of_queries(dim),
      all_keys,
      all_keys,
      pl.BlockSpec((None, tiles.query, 1), lambda b, n, i: (b, i, 0)),
      of_queries(dim),
      of_queries(1),
      of_queries(1),
    ],
    out_specs=of_queries(dim),
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
  )(block_first, query, key, value, first[..., None], out_gradient, log_normalizer[..., None], means[..., None])

  # The last block of queries that sees any key of a block.
  key_end = (jnp.arange(num_key_blocks) + 1) * tiles.key
  sees = block_first[:, None, :] < key_end[:, None]
  block_last = jnp.max(jnp.where(sees, jnp.arange(1, num_query_blocks + 1, dtype=jnp.int32), 0), axis=2)
  rows = lambda array: array.reshape(*array.shape[:-1], num_query_blocks, 1, tiles.query)
  of_keys = pl.BlockSpec((None, None, tiles.key, dim), lambda b, k, j: (b, k, j, 0))
  all_queries = whole_rows(platform, (None, G, length, dim), lambda b, k, j: (b, k, 0, 0))
  rows_shape = (None, G, num_query_blocks, 1, tiles.query)
  all_rows = whole_rows(platform, rows_shape, lambda b, k, j: (b, k, 0, 0, 0))
  key_gradient, value_gradient = call(
    partial(_key_gradient_kernel, scoring, S - T),
    grid=(B, K, num_key_blocks),
    in_specs=[
      scalars(platform, block_last.shape),
      all_queries,
      of_keys,
      of_keys,
      pl.BlockSpec((None, num_query_blocks, 1, tiles.query), lambda b, k, j: (b, 0, 0, 0)),
      all_queries,
      all_rows,
      all_rows,
    ],
    out_specs=[of_keys, of_keys],
    out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
  )(block_last, query, key, value, rows(first), out_gradient, rows(log_normalizer), rows(means))
  return query_gradient[:, :, :T, :H], key_gradient[:, :, :S, :H], value_gradient[:, :, :S, :H]


def _query_gradient_kernel(
  scoring, start, s, block_first, query, key, value, first, out_gradient, log_normalizer, mean, out
):
  b, _, i = (pl.program_id(axis) for axis in range(3))
  t, H = query.shape
  q, first_key, d, z, m = query[...], first[...], out_gradient[...], log_normalizer[...], mean[...]
  of_query = start + i * t + jax.lax.broadcasted_iota(jnp.int32, (t, s), 0)
  column = jax.lax.broadcasted_iota(jnp.int32, (t, s), 1)

  def step(j, gradient):
    keys = pl.ds(pl.multiple_of(j * s, s), s)
    k = key[keys, :]
    scores = _scores(q, k, scoring)
    of_key = j * s + column
    weights = jnp.where((of_key >= first_key) & (of_key <= of_query), jnp.exp(scores - z), 0)
    scores_gradient = _scores_gradient(weights, scores, _dot_rows(d, value[keys, :]) - m, scoring)
    return gradient + _dot(scores_gradient.astype(k.dtype), k)

  last = jax.lax.div(start + (i + 1) * t + s - 1, s)
  gradient = jax.lax.fori_loop(jax.lax.div(block_first[b, i], s), last, step, jnp.zeros((t, H), jnp.float32))
  out[...] = gradient.astype(out.dtype)


def _key_gradient_kernel(
  scoring, start, block_last, query, key, value, first, out_gradient, log_normalizer, mean, key_out, value_out
):
  b, _, j = (pl.program_id(axis) for axis in range(3))
  s, H = key.shape
  G, t = query.shape[0], first.shape[-1]
  k, v = key[...], value[...]
  of_key = j * s + jax.lax.broadcasted_iota(jnp.int32, (s, t), 0)
  column = jax.lax.broadcasted_iota(jnp.int32, (s, t), 1)

  # Scores are [keys, queries] here, so that both gradients are plain products with queries and output gradients.
  def step(g, i, carry):
    key_gradient, value_gradient = carry
    queries = pl.ds(pl.multiple_of(i * t, t), t)
    q, d = query[g, queries, :], out_gradient[g, queries, :]
    scores = _scores(k, q, scoring)
    of_query = start + i * t + column
    weights = jnp.where((of_key >= first[i]) & (of_key <= of_query), jnp.exp(scores - log_normalizer[g, i]), 0)
    scores_gradient = _scores_gradient(weights, scores, _dot_rows(v, d) - mean[g, i], scoring)
    return key_gradient + _dot(scores_gradient.astype(q.dtype), q), value_gradient + _dot(weights.astype(d.dtype), d)

  first_block = jax.lax.div(jnp.maximum(j * s - start, 0), t)
  of_head = lambda g, carry: jax.lax.fori_loop(first_block, block_last[b, j], partial(step, g), carry)
  zeros = jnp.zeros((s, H), jnp.float32)
  key_gradient, value_gradient = jax.lax.fori_loop(0, G, of_head, (zeros, zeros))
  key_out[...] = key_gradient.astype(key_out.dtype)
  value_out[...] = value_gradient.astype(value_out.dtype)


def _dot(a: Float[Array, "t s"], b: Float[Array, "s H"]) -> Float[Array, "t H"]:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _dot_rows(a: Float[Array, "t H"], b: Float[Array, "s H"]) -> Float[Array, "t s"]:
  return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _scores(query: Float[Array, "t H"], key: Float[Array, "s H"], scoring: Scoring) -> Float[Array, "t s"]:
  scores = _dot_rows(query, key) * scoring.scale
  return scores if scoring.soft_cap is None else scoring.soft_cap * jnp.tanh(scores * (1 / scoring.soft_cap))


def _scores_gradient(weights, scores, weights_gradient, scoring: Scoring):
  """Returns the gradient of query . key."""
  gradient = weights * weights_gradient * scoring.scale
  return gradient if scoring.soft_cap is None else gradient * (1 - jnp.square(scores * (1 / scoring.soft_cap)))


def _fit(tiles: _Tiles, query: Float[Array, "B N T H"], key: Float[Array, "B K S H"]) -> tuple[_Tiles, int, int, int]:
  """Returns tiles that are no longer than rows, the lengths queries and keys are padded to, and the padded head dim."""
  (T, H), S = query.shape[2:], key.shape[2]
  fit = lambda block, length: max(16, min(block * 2 // query.dtype.itemsize, power_of_two(length)))
  tiles = tiles._replace(query=fit(tiles.query, T), key=fit(tiles.key, S))
  up = lambda length, block: -(-length // block) * block
  length = up(T, tiles.query)
  return tiles, length, up(S - T + length, tiles.key), power_of_two(H)


def _pad(array: Float[Array, "B N T H"], length: int, dim: int) -> Array:
  return jnp.pad(array, ((0, 0), (0, 0), (0, length - array.shape[2]), (0, dim - array.shape[3])))


def _pad_queries(first: Int[Array, "B T"], length: int, num_keys: int, key_length: int) -> Array:
  """Returns `first` with queries at the end that, like padding, see none of the keys now padded to `key_length`."""
  first = jnp.where(first == num_keys, key_length, first)
  return jnp.pad(first, ((0, 0), (0, length - first.shape[1])), constant_values=key_length)


def _first_of_blocks(first: Int[Array, "B T"], block: int) -> Int[Array, "B C"]:
  return jnp.min(first.reshape(first.shape[0], -1, block), axis=2)
