"""Grouped-query softmax attention, the plain form that holds all scores at once.

Source: arXiv:2305.13245 (grouped queries), arXiv:2004.05150 (sliding window).
Letters: B batch  T query length  S key length  N query heads  K kv heads  G = N/K  H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
  window_tokens: int | None = None,
) -> Float[Array, "B T N H"]:
  """Returns softmax(query key / sqrt(H)) value over the visible keys, 0 for padding; the softmax is float32."""
  B, T, N, H = query.shape
  K = key.shape[2]
  mask = visible(query_positions, key_positions, query_segments, key_segments, window_tokens)[:, None, None]
  query = query.reshape(B, T, K, N // K, H)
  scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32) * H**-0.5
  weights = jax.nn.softmax(scores, axis=-1, where=mask)
  out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
  return out.reshape(B, T, N, H)
