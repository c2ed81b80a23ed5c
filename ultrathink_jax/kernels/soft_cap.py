"""The soft cap of logits and attention scores. Source: arXiv:2408.00118."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Cap = Float[Array, ""] | float | None


def soft_cap(x: Float[Array, "*dims"], cap: Cap) -> Float[Array, "*dims"]:
  """Returns cap * tanh(x / cap), or x without a cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def through_soft_cap(gradient: Float[Array, "*dims"], capped: Float[Array, "*dims"], cap: Cap) -> Float[Array, "*dims"]:
  """Returns the gradient of x from that of capped = soft_cap(x, cap)."""
  return gradient if cap is None else gradient * (1 - jnp.square(capped / cap))
