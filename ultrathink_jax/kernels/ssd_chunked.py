"""State-space duality in chunks: matrix products inside a chunk, a short recurrence over the states between chunks.

Source: arXiv:2405.21060 section 6.
Letters: B batch  T length  C chunks  Q chunk length (i, j inside)  N heads  K groups  G = N/K  P head dim  Z state size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.ssd import is_document_start


def ssd_chunked(
  x: Float[Array, "B T N P"],
  dt: Float[Array, "B T N"],
  a: Float[Array, " N"],
  b: Float[Array, "B T K Z"],
  c: Float[Array, "B T K Z"],
  segment_ids: Int[Array, "B T"],
  state: Float[Array, "B N P Z"] | None = None,
  chunk_tokens: int = 128,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P Z"]]:
  """Returns what `ssd` does, for any T and chunk length; memory is linear in T.

  Decays, the states and every sum are at least float32; the factors of the matrix products have the dtype of x.
  """
  B, T, N, P = x.shape
  K, Z = b.shape[2:]
  G = N // K
  Q = min(chunk_tokens, T)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  starts = is_document_start(segment_ids)
  padding = -T % Q
  if padding:
    x, dt, b, c, starts = (jnp.pad(v, ((0, 0), (0, padding)) + ((0, 0),) * (v.ndim - 2)) for v in (x, dt, b, c, starts))
  C = x.shape[1] // Q

  by_head = lambda array: array.reshape(B, C, Q, K, G, -1).transpose(0, 1, 3, 4, 2, 5)  # [B, C, K, G, Q, _]
  by_group = lambda array: array.reshape(B, C, Q, K, Z).transpose(0, 1, 3, 2, 4)  # [B, C, K, Q, Z]
  dt = by_head(dt.astype(dtype))
  decay_log = jnp.cumsum(dt * a.astype(dtype).reshape(K, G, 1, 1), axis=4)  # sum of dt a from the chunk's start to i
  x_dt = (by_head(x) * dt).astype(x.dtype)
  b, c = by_group(b), by_group(c)
  document = jnp.cumsum(starts.reshape(B, C, 1, 1, Q), axis=4)  # documents begun in this chunk

  y = _inside_chunks(x_dt, decay_log, b, c, document)

  # What a chunk adds to the state at its end, and what it leaves of the state before it. Heads of a group side by side.
  last = decay_log[..., -1:, :]
  reaches_end = (document == document[..., -1:])[..., None]
  weighted = x_dt * jnp.where(reaches_end, jnp.exp(last - decay_log), 0).astype(x.dtype)
  added = jnp.einsum("bckqz,bckqm->bckzm", b, _merge_heads(weighted), preferred_element_type=dtype)
  kept = jnp.where(document[..., -1] == 0, jnp.exp(last[..., 0, 0]), 0)  # [B, C, K, G]
  kept = jnp.repeat(kept, P, axis=-1)[:, :, :, None]

  def carry_over(h: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
    added, kept = chunk
    return h * kept + added, h

  h = jnp.zeros((B, K, Z, G * P), dtype)
  if state is not None:
    h = state.astype(dtype).reshape(B, K, G * P, Z).swapaxes(2, 3)
  h, before = jax.lax.scan(carry_over, h, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(kept, 1, 0)))
  before = jnp.moveaxis(before, 0, 1).astype(x.dtype)
  carried = jnp.einsum("bckqz,bckzm->bckqm", c, before, preferred_element_type=dtype)
  carried = carried.reshape(B, C, K, Q, G, P).swapaxes(3, 4)
  y += jnp.where((document == 0)[..., None], jnp.exp(decay_log), 0) * carried
  y = y.transpose(0, 1, 4, 2, 3, 5).reshape(B, C * Q, N, P)[:, :T].astype(x.dtype)
  return y, h.swapaxes(2, 3).reshape(B, N, P, Z)


@jax.checkpoint
def _inside_chunks(
  x_dt: Float[Array, "B C K G Q P"],
  decay_log: Float[Array, "B C K G Q 1"],
  b: Float[Array, "B C K Q Z"],
  c: Float[Array, "B C K Q Z"],
  document: Int[Array, "B C 1 1 Q"],
) -> Float[Array, "B C K G Q P"]:
  """Returns y_i = sum_{j <= i} (c_i b_j) exp(decay_i - decay_j) dt_j x_j over the chunk and document of i.

  Recomputed in the backward pass: its Q x Q matrices outweigh everything else a layer keeps.
  """
  dtype, Q = decay_log.dtype, x_dt.shape[4]
  is_seen = (document[..., :, None] == document[..., None, :]) & jnp.tri(Q, dtype=bool)
  decay = jnp.exp(jnp.where(is_seen, decay_log - decay_log.swapaxes(4, 5), -jnp.inf))
  scores = jnp.einsum("bckiz,bckjz->bckij", c, b, preferred_element_type=dtype)
  weights = (scores[:, :, :, None] * decay).astype(x_dt.dtype)
  return jnp.einsum("bckgij,bckgjp->bckgip", weights, x_dt, preferred_element_type=dtype)


def _merge_heads(array: Float[Array, "B C K G Q P"]) -> Float[Array, "B C K Q M"]:
  """Returns the heads of a group side by side: M = G P."""
  B, C, K, G, Q, P = array.shape
  return array.swapaxes(3, 4).reshape(B, C, K, Q, G * P)
