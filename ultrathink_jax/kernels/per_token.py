"""Parameters that every token meets, and the sums over tokens that are their gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ultrathink_jax.platform import target_platform


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def per_token(parameter: Float[Array, "*dims"], tokens: tuple[int, ...]) -> Float[Array, "..."]:
  """Returns `parameter` once for each of `tokens`, as [B, T]; its gradient is a `sum_over_tokens`."""
  return jnp.broadcast_to(parameter, (*tokens, *parameter.shape))


def _forward(parameter, tokens):
  return per_token(parameter, tokens), None


def _backward(tokens, _, gradient):
  return (sum_over_tokens(gradient, len(tokens)).astype(gradient.dtype),)


per_token.defvjp(_forward, _backward)


def sum_over_tokens(
  array: Float[Array, "..."], num_token_dims: int = 2, weights: Shaped[Array, "..."] | None = None
) -> Float[Array, "..."]:
  """Returns the sum over the first dims, which `weights` has if it is given, in float32.

  XLA on CPU sums over outer dims a window of 32 at a time, each result by itself along a stride: a million elements in
  2.7 ms on one core of an AMD EPYC (Zen 4), where a product with ones takes 0.2.
  """
  axes = tuple(range(num_token_dims))
  array = array.astype(jnp.float32)
  weights = jnp.ones(array.shape[:num_token_dims]) if weights is None else weights.astype(jnp.float32)
  if target_platform() != "cpu":  # where a product may round its factors
    return jnp.sum(array * jnp.expand_dims(weights, tuple(range(num_token_dims, array.ndim))), axes)
  return jax.lax.dot_general(weights, array, ((axes, axes), ((), ())))
