"""Weighted sums of next-token losses, the plain form that holds all logits.

Letters: B batch  T length  D embed  V vocab.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.soft_cap import Cap, soft_cap


class TokenLosses(NamedTuple):
  """Weighted sums over tokens, in nats.

  Attributes:
    target: cross-entropy with the targets.
    even: cross-entropy with an even distribution over the vocabulary, of which label smoothing takes a share; None
      where it takes none.
    z: squared log of the softmax's normaliser; None where it has no weight.
  """

  target: Float[Array, ""]
  even: Float[Array, ""] | None
  z: Float[Array, ""] | None

  def total(self, smoothing: float, z_weight: float) -> Float[Array, ""]:
    """Returns (1 - smoothing) target + smoothing even + z_weight z."""
    total = self.target
    if self.even is not None:
      total = (1 - smoothing) * total + smoothing * self.even
    return total if self.z is None else total + z_weight * self.z


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
  return token_losses(hidden, table, targets, weights, cap).target


def token_losses(
  hidden: Float[Array, "B T D"],
  table: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  cap: Cap = None,
  smoothing: float = 0.0,
  z_weight: float = 0.0,
) -> TokenLosses:
  """Returns the sums of which a loss is made; see `TokenLosses.total`."""
  logits = jnp.einsum("btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
  logits = soft_cap(logits, cap)
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  return TokenLosses(
    jnp.sum(weights * (normalizer - target_logits)),
    jnp.sum(weights * (normalizer - jnp.mean(logits, axis=-1))) if smoothing else None,
    jnp.sum(weights * jnp.square(normalizer)) if z_weight else None,
  )
