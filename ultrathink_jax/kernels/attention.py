"""Grouped-query softmax attention, the plain form that holds all scores at once.

Source: arXiv:2305.13245 (grouped queries), arXiv:2004.05150 (sliding window), arXiv:2408.00118 (soft cap),
arXiv:2309.17453 and openai/gpt-oss (learned sinks).
Letters: B batch  T query length  S key length  N query heads  K kv heads  G = N/K  H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.soft_cap import soft_cap


class Scoring(NamedTuple):
  """How scores come from queries and keys; plain numbers, so that it can be static.

  Attributes:
    scale: of query . key.
    soft_cap: scores become cap * tanh(score / cap); None leaves them.
    window_tokens: keys a query sees, itself included; None for all.
  """

  scale: float
  soft_cap: float | None = None
  window_tokens: int | None = None


def visible(
  query_positions: Int[Array, "B T"],
  key_positions: Int[Array, "B S"],
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B S"],
  window_tokens: int | None,
) -> Bool[Array, "B T S"]:
  """Returns which keys a query sees: same document, not later, at most `window_tokens` back counting itself.

  Padding (segment 0) sees nothing and is seen by nobody.
  """
  query_positions, key_positions = query_positions[:, :, None], key_positions[:, None, :]
  query_segments, key_segments = query_segments[:, :, None], key_segments[:, None, :]
  mask = (query_segments == key_segments) & (query_segments != 0) & (key_positions <= query_positions)
  if window_tokens is not None:
    mask &= query_positions - key_positions < window_tokens
  return mask


def attention(
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
  """Returns softmax(scores) value over the visible keys, 0 for padding; scores and softmax are float32.

  `sinks` are scores of one more key per head that every query sees and whose value is 0. `start`, the index of the
  first query among the keys, is for the other forms, which know from it what need not be computed.
  """
  B, T, N, H = query.shape
  K = key.shape[2]
  mask = visible(query_positions, key_positions, query_segments, key_segments, scoring.window_tokens)[:, None, None]
  query = query.reshape(B, T, K, N // K, H)
  scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32) * scoring.scale
  scores = soft_cap(scores, scoring.soft_cap)
  if sinks is not None:
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(K, N // K, 1, 1), (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, sinks], axis=-1)
    mask = jnp.concatenate([mask, jnp.ones_like(mask[..., :1])], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1, where=mask)[..., : key.shape[1]]
  # Heads first, which is the order of a plain product: with another one, XLA on CPU multiplies transposed values.
  out = jnp.einsum("bkgts,bskh->bkgth", weights.astype(value.dtype), value)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
