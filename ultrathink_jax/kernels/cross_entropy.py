"""Weighted sum of next-token cross-entropies, the plain form that holds all logits.

Letters: B batch  T length  D embed  V vocab.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.soft_cap import Cap, soft_cap


def cross_entropy(
  hidden: Float[Array, "B T D"],
  table: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  cap: Cap = None,
) -> Float[Array, ""]:
  """Returns sum_t weights_t (logsumexp(logits_t) - logits_t[targets_t]) in nats.

  The float32 logits are hidden table^T, softly capped.
  """
  logits = jnp.einsum("btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
  logits = soft_cap(logits, cap)
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))
