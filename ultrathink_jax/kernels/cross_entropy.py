"""Weighted sum of next-token cross-entropies, the plain form that holds all logits.

Letters: B batch  T length  D embed  V vocab.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def soft_cap(logits: Float[Array, "..."], cap: Float[Array, ""] | float | None) -> Float[Array, "..."]:
  """Returns cap * tanh(logits / cap), or logits without a cap. Source: arXiv:2408.00118."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def cross_entropy(
  hidden: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  cap: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
  """Returns sum_t weights_t (logsumexp(logits_t) - logits_t[targets_t]) in nats.

  The float32 logits are hidden kernel, softly capped.
  """
  logits = jnp.einsum("btd,dv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
  logits = soft_cap(logits, cap)
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))
