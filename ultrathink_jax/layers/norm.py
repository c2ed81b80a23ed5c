"""Root-mean-square normalisation. Source: arXiv:1910.07467."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ultrathink_jax.kernels.per_token import per_token


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last `len(axes)` dims; computed in float32, given in x's dtype.

  Attributes:
    num_groups: equal parts of the first of these dims that have a mean of their own.
  """

  epsilon: float
  axes: tuple[str, ...] = ("embed",)
  num_groups: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    tokens, normed_dims = x.shape[: x.ndim - len(self.axes)], x.shape[x.ndim - len(self.axes) :]
    init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
    scale = self.param("scale", init, normed_dims, jnp.float32)
    x32 = x.astype(jnp.float32).reshape(*tokens, self.num_groups, -1)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).reshape(x.shape)
    return (normed * per_token(scale, tokens)).astype(x.dtype)
