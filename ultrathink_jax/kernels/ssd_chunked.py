"""State-space duality in chunks: matrix products inside a chunk, a short recurrence over the states between chunks.

Source: arXiv:2405.21060 section 6.
Letters: B batch  T length  C chunks of a row  Q chunk length (i, j inside)  N heads  K groups  G = N/K  P head dim
Z state size  I = B C K: the chunks of all rows and groups, which are independent but for the state  M = G P.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.matmul import transposed
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

  by_head = lambda array: array.reshape(B, C, Q, K, G, -1).transpose(0, 1, 3, 4, 2, 5).reshape(B * C * K, G, Q, -1)
  by_group = lambda array: array.reshape(B, C, Q, K, Z).swapaxes(2, 3).reshape(B * C * K, Q, Z)
  dt = by_head(dt.astype(dtype))
  decay_rates = jnp.tile(a.astype(dtype).reshape(K, G), (B * C, 1))[..., None, None]
  x_dt = (by_head(x) * dt).astype(x.dtype)
  b, c = by_group(b), by_group(c)
  document = jnp.cumsum(starts.reshape(B * C, Q), axis=1)  # documents begun in this chunk
  document = jnp.repeat(document, K, axis=0)[:, None, :, None]  # [I, 1, Q, 1]
  is_seen = materialized(partial(_is_seen, dtype=dtype), document[:, 0])
  # [I, G, Q, 1]: sum of dt a up to i from the start of its document or, if that lies before, of the chunk. A product
  # with a triangle rather than a cumsum, which XLA would recompute inside each of the Q x Q exponentials that read it.
  decay_log = jnp.einsum("iqr,igro->igqo", is_seen, dt * decay_rates, precision=jax.lax.Precision.HIGHEST)

  y = _inside_chunks(x_dt, decay_log, b, c, is_seen)

  # What a chunk adds to the state at its end, and what it leaves of the state before it. Heads of a group side by side.
  last = decay_log[:, :, -1:]
  to_end = jnp.exp(jnp.where(document == document[:, :, -1:], last - decay_log, -jnp.inf))
  weighted = x_dt * to_end.astype(x.dtype)
  added = jnp.einsum("izq,iqm->izm", transposed(b), _merge_heads(weighted), preferred_element_type=dtype)
  kept = jnp.where(document[:, 0, -1] == 0, jnp.exp(last[:, :, 0, 0]), 0)  # [I, G]
  kept = jnp.repeat(kept, P, axis=1)[:, None]

  def carry_over(h: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
    added, kept = chunk
    return h * kept + added, h

  over_time = lambda array: jnp.moveaxis(array.reshape(B, C, K, *array.shape[1:]), 1, 0)
  h = jnp.zeros((B, K, Z, G * P), dtype)
  if state is not None:
    h = state.astype(dtype).reshape(B, K, G * P, Z).swapaxes(2, 3)
  h, before = jax.lax.scan(carry_over, h, (over_time(added), over_time(kept)))
  before = jnp.moveaxis(before, 0, 1).reshape(B * C * K, Z, G * P).astype(x.dtype)
  carried = jnp.einsum("iqz,izm->iqm", c, before, preferred_element_type=dtype)
  carried = carried.reshape(-1, Q, G, P).swapaxes(1, 2)
  y += jnp.where(document == 0, jnp.exp(decay_log), 0) * carried
  y = y.reshape(B, C, K, G, Q, P).transpose(0, 1, 4, 2, 3, 5).reshape(B, C * Q, N, P)[:, :T].astype(x.dtype)
  return y, h.swapaxes(2, 3).reshape(B, N, P, Z)


def _is_seen(document: Int[Array, "I Q 1"], dtype: Any) -> Float[Array, "I Q Q"]:
  """Returns 1 where what lies at j is of the document of i, and not after it."""
  Q = document.shape[1]
  return ((document == document.swapaxes(1, 2)) & jnp.tri(Q, dtype=bool)).astype(dtype)


@jax.custom_vjp
def _inside_chunks(
  x_dt: Float[Array, "I G Q P"],
  decay_log: Float[Array, "I G Q 1"],
  b: Float[Array, "I Q Z"],
  c: Float[Array, "I Q Z"],
  is_seen: Float[Array, "I Q Q"],
) -> Float[Array, "I G Q P"]:
  """Returns y_i = sum_{j <= i} (c_i b_j) exp(decay_i - decay_j) dt_j x_j over the chunk and document of i.

  The backward pass computes the Q x Q matrices again, which outweigh everything else a layer keeps, and transposed, so
  that every product has its operands in plain order. What decays get needs none of them: of i, the gradient of y_i
  times y_i; of j, minus the gradient of x_j times x_j.
  """
  dtype = decay_log.dtype
  scores = jnp.einsum("iqz,ijz->iqj", c, b, preferred_element_type=dtype) * is_seen
  weights = scores[:, None] * _decay(decay_log, decay_log.swapaxes(2, 3))
  return jnp.einsum("igqj,igjp->igqp", weights.astype(x_dt.dtype), x_dt, preferred_element_type=dtype)


def _decay(until: Float[Array, "I G _ _"], since: Float[Array, "I G _ _"]) -> Float[Array, "I G Q Q"]:
  """Returns exp(until - since), at most 1: it grows only where nothing is seen and must stay finite there."""
  return jnp.exp(jnp.minimum(until - since, 0))


def _inside_forward(x_dt, decay_log, b, c, is_seen):
  y = _inside_chunks(x_dt, decay_log, b, c, is_seen)
  return y, (x_dt, decay_log, b, c, is_seen, y)


def _inside_backward(residuals, y_gradient):
  x_dt, decay_log, b, c, is_seen, y = residuals
  dtype = decay_log.dtype
  gradient = y_gradient.astype(x_dt.dtype)
  seen = is_seen.swapaxes(1, 2)  # from here on, keys j first
  scores = jnp.einsum("ijz,iqz->ijq", b, c, preferred_element_type=dtype) * seen
  decay = _decay(decay_log.swapaxes(2, 3), decay_log)
  weights = (scores[:, None] * decay).astype(x_dt.dtype)
  x_gradient = jnp.einsum("igjq,igqp->igjp", weights, gradient, preferred_element_type=dtype)
  weights_gradient = jnp.einsum("igjp,igqp->igjq", x_dt, gradient, preferred_element_type=dtype)
  scores_gradient = (jnp.sum(weights_gradient * decay, axis=1) * seen).astype(b.dtype)
  b_gradient = jnp.einsum("ijq,iqz->ijz", scores_gradient, c, preferred_element_type=dtype)
  c_gradient = jnp.einsum("ijq,ijz->iqz", scores_gradient, b, preferred_element_type=dtype)
  decay_gradient = jnp.sum(y_gradient * y, -1, keepdims=True) - jnp.sum(x_dt * x_gradient, -1, keepdims=True)
  return x_gradient.astype(x_dt.dtype), decay_gradient, b_gradient.astype(b.dtype), c_gradient.astype(c.dtype), None


_inside_chunks.defvjp(_inside_forward, _inside_backward)


def _merge_heads(array: Float[Array, "I G Q P"]) -> Float[Array, "I Q M"]:
  """Returns the heads of a group side by side."""
  I, G, Q, P = array.shape
  return array.swapaxes(1, 2).reshape(I, Q, G * P)
