"""Attention by cuDNN, on NVIDIA GPUs from Hopper on, in 16-bit formats.

cuDNN is told where each document of a packed row begins and how long it is, so that no mask over pairs of tokens is
ever made. It allots space for a fixed number of documents a row; a batch with a fuller row goes to the Pallas kernels,
which decide so on the device, step by step. Keys and values are repeated for every query head of their group, because
JAX derives the place of a document's keys from the number of query heads.

Letters: B batch  T query length  S key length  N query heads  K kv heads  H head dim  M most documents of a row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.attention import Scoring
from ultrathink_jax.kernels.attention_pallas import attention_pallas

_MAX_DOCUMENTS = 16  # of a row; cuDNN keeps a float32 per query and head for each


class Documents(NamedTuple):
  """Where the documents of each row lie, in their order; -1 where a row has fewer."""

  starts: Int[Array, "B M+1"]  # with one -1 more than documents fit
  lengths: Int[Array, "B M"]
  count: Int[Array, " B"]  # of all documents, those included that did not find a place


def find_documents(segment_ids: Int[Array, "B T"], max_documents: int) -> Documents:
  """Returns the runs of equal segment ids. Padding is one too, so that there is no token without a document."""
  T = segment_ids.shape[1]
  changes = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 1)), constant_values=True)

  def places(is_marked: Array) -> Int[Array, "B M"]:
    ordered = jnp.sort(jnp.where(is_marked, jnp.arange(T, dtype=jnp.int32), T), axis=1)
    ordered = jnp.pad(ordered, ((0, 0), (0, max_documents)), constant_values=T)[:, :max_documents]
    return jnp.where(ordered < T, ordered, -1)

  starts, ends = places(changes[:, :-1]), places(changes[:, 1:])
  lengths = jnp.where(starts >= 0, ends - starts + 1, -1)
  count = jnp.sum(changes[:, :-1], axis=1, dtype=jnp.int32)
  return Documents(jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), lengths, count)


def attention_cudnn(
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

  There is no soft cap and there are no sinks: backends.resolve_attention sends those elsewhere. Fewer queries than
  keys, as a context axis has, go to the Pallas kernels: cuDNN's mask begins with the first key of a document.
  """
  assert scoring.soft_cap is None
  assert sinks is None
  where = (query_positions, key_positions, query_segments, key_segments)
  if query.shape[1] < key.shape[1]:
    return attention_pallas(query, key, value, *where, scoring, sinks, start)
  documents = find_documents(query_segments, _MAX_DOCUMENTS)
  return jax.lax.cond(
    jnp.max(documents.count) <= _MAX_DOCUMENTS,
    lambda *arrays: _attend(*arrays, query_segments != 0, documents, scoring),
    lambda *arrays: _by_pallas(*arrays, where, scoring),
    *(query, key, value),
  )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_pallas(query, key, value, where, scoring: Scoring):
  """Returns `attention_pallas` and keeps nothing of it: each branch makes room for what the other one keeps."""
  return attention_pallas(query, key, value, *where, scoring)


def _by_pallas_forward(query, key, value, where, scoring: Scoring):
  return _by_pallas(query, key, value, where, scoring), (query, key, value, where)


def _by_pallas_backward(scoring: Scoring, residuals, gradient):
  *arrays, where = residuals
  return *jax.vjp(lambda *arrays: attention_pallas(*arrays, *where, scoring), *arrays)[1](gradient), None


_by_pallas.defvjp(_by_pallas_forward, _by_pallas_backward)


def _attend(query, key, value, is_token, documents: Documents, scoring: Scoring):
  # The public jax.nn.dot_product_attention has lengths but no offsets.
  from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

  repeats = query.shape[2] // key.shape[2]
  out = dot_product_attention(
    query,
    jnp.repeat(key, repeats, axis=2),
    jnp.repeat(value, repeats, axis=2),
    q_seqlen=documents.lengths,
    kv_seqlen=documents.lengths,
    q_offsets=documents.starts,
    kv_offsets=documents.starts,
    scale=scoring.scale,
    mask_type=MaskType.PADDING_CAUSAL,
    sliding_window_length=scoring.window_tokens,
  )
  return jnp.where(is_token[:, :, None, None], out, 0)
