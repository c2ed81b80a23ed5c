"""State-space duality (Mamba-2): the sequential recurrence, and the boundaries its state may not cross.

Source: arXiv:2405.21060 eq. 1 and section 6.
Letters: B batch  T length  N heads  K groups  P head dim  Z state size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def is_document_start(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
  """Returns True where a token opens another document than the one before it; padding (0) opens none.

  The first token of a row is no start: what state it meets is the caller's choice.
  """
  previous = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
  return (segment_ids != previous) & (segment_ids != 0)


def ssd(
  x: Float[Array, "B T N P"],
  dt: Float[Array, "B T N"],
  a: Float[Array, " N"],
  b: Float[Array, "B T K Z"],
  c: Float[Array, "B T K Z"],
  segment_ids: Int[Array, "B T"],
  state: Float[Array, "B N P Z"] | None = None,
  chunk_tokens: int = 1,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P Z"]]:
  """Returns y and the last state of h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t, one token at a time.

  `dt` is positive and must be 0 at padding, which then leaves the state as it is; h restarts from 0 where a document
  starts. Heads of a group share b and c. The state is at least float32, y has the dtype of x. `chunk_tokens` is for the
  other forms.
  """
  B, _, N, P = x.shape
  K, Z = b.shape[2:]
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  heads = lambda array: jnp.repeat(array, N // K, axis=2)

  def step(h, inputs):
    x_t, dt_t, b_t, c_t, is_start = inputs
    decay = jnp.where(is_start[:, None], 0, jnp.exp(dt_t * a))
    h = decay[..., None, None] * h + jnp.einsum("bn,bnp,bnz->bnpz", dt_t, x_t, b_t)
    return h, jnp.einsum("bnpz,bnz->bnp", h, c_t)

  if state is None:
    state = jnp.zeros((B, N, P, Z), dtype)
  over_time = (x, dt, heads(b), heads(c), is_document_start(segment_ids))
  over_time = jax.tree.map(
    lambda array: jnp.moveaxis(array, 1, 0).astype(array.dtype if array.dtype == bool else dtype), over_time
  )
  last, y = jax.lax.scan(step, state.astype(dtype), over_time)
  return jnp.moveaxis(y, 0, 1).astype(x.dtype), last
