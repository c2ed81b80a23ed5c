"""Weighted sum of next-token cross-entropies, the plain form that holds all logits.

Letters: B batch  T length  D embed  V vocab.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  hidden: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
) -> Float[Array, ""]:
  """Returns sum_t weights_t (logsumexp(logits_t) - logits_t[targets_t]) for float32 logits = hidden kernel, in nats."""
  logits = jnp.einsum("btd,dv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))
