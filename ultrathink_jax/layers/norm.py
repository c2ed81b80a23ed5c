"""Root-mean-square normalisation. Source: arXiv:1910.07467."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last `len(axes)` dims; computed in float32, given in x's dtype."""

  epsilon: float
  axes: tuple[str, ...] = ("embed",)

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    dims = tuple(range(-len(self.axes), 0))
    init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
    scale = self.param("scale", init, x.shape[x.ndim - len(self.axes) :], jnp.float32)
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=dims, keepdims=True)
    return (x32 * jnp.reciprocal(jnp.sqrt(mean_square + self.epsilon)) * scale).astype(x.dtype)
