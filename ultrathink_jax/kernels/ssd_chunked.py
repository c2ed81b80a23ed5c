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

  dt = dt.astype(dtype).reshape(B, C, Q, K, G)
  decay_log = jnp.cumsum(dt * a.astype(dtype).reshape(K, G), axis=2)  # sum of dt a from the chunk's start through i
  document = jnp.cumsum(starts.reshape(B, C, Q), axis=2)  # documents begun in this chunk: equal means same document
  x_dt = (x.reshape(B, C, Q, K, G, P) * dt[..., None]).astype(x.dtype)
  b, c = b.reshape(B, C, Q, K, Z), c.reshape(B, C, Q, K, Z)

  # Inside a chunk: y_i = sum_{j <= i} (c_i b_j) exp(decay_i - decay_j) dt_j x_j.
  mask = (document[:, :, :, None] == document[:, :, None, :]) & jnp.tri(Q, dtype=bool)
  by_head = decay_log.transpose(0, 1, 3, 4, 2)  # [B, C, K, G, Q]
  exponent = jnp.where(mask[:, :, None, None], by_head[..., :, None] - by_head[..., None, :], -jnp.inf)
  scores = jnp.einsum("bcikz,bcjkz->bckij", c, b, preferred_element_type=dtype)
  weights = (scores[:, :, :, None] * jnp.exp(exponent)).astype(x.dtype)
  y = jnp.einsum("bckgij,bcjkgp->bcikgp", weights, x_dt, preferred_element_type=dtype)

  # What a chunk adds to the state at its end, and what it leaves of the state before it.
  reaches_end = document == document[:, :, -1:]
  to_end = jnp.where(reaches_end[..., None, None], jnp.exp(decay_log[:, :, -1:] - decay_log), 0)
  added = jnp.einsum("bcjkz,bcjkgp->bckgpz", b, (x_dt * to_end[..., None]).astype(x.dtype), preferred_element_type=dtype)
  kept = jnp.where(document[:, :, -1, None, None] == 0, jnp.exp(decay_log[:, :, -1]), 0)  # [B, C, K, G]

  def carry_over(h, chunk):
    added, kept = chunk
    return h * kept[..., None, None] + added, h

  h = jnp.zeros((B, K, G, P, Z), dtype) if state is None else state.astype(dtype).reshape(B, K, G, P, Z)
  last, before = jax.lax.scan(carry_over, h, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(kept, 1, 0)))
  from_start = jnp.where((document == 0)[..., None, None], jnp.exp(decay_log), 0)
  y += from_start[..., None] * jnp.einsum(
    "bcikz,cbkgpz->bcikgp", c, before.astype(x.dtype), preferred_element_type=dtype
  )
  y = y.reshape(B, C * Q, N, P)[:, :T].astype(x.dtype)
  return y, last.reshape(B, N, P, Z)
