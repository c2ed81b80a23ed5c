"""The projection every weight matrix goes through, and the banks of expert matrices.

Letters: E experts  D embed  F expert width.
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ultrathink_jax.kernels.matmul import matmul

PROJECTED = "projected"  # what a projection returns, by which remat policies know it


def fan_in_init(fan_in: int, scale: float = 1.0) -> nn.initializers.Initializer:
  """Returns a normal of standard deviation scale / sqrt(fan_in), cut at two deviations."""
  return nn.initializers.truncated_normal(scale * fan_in**-0.5)


class Projection(nn.Module):
  """Contracts the last dims of x with a kernel [*in_dims, *out_dims].

  Attributes:
    out_dims: sizes of the dims it makes.
    axes: logical axis of every kernel dim, those of the input first.
    scale: of the initial standard deviation, beside 1 / sqrt(fan in).
    has_bias: add a bias [*out_dims], 0 at first.
  """

  out_dims: tuple[int, ...]
  axes: tuple[str | None, ...]
  scale: float = 1.0
  has_bias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    num_in = len(self.axes) - len(self.out_dims)
    in_dims = x.shape[x.ndim - num_in :]
    init = nn.with_logical_partitioning(fan_in_init(math.prod(in_dims), self.scale), self.axes)
    kernel = self.param("kernel", init, (*in_dims, *self.out_dims), jnp.float32)
    outer = x.shape[: x.ndim - num_in]
    y = matmul(x.reshape(-1, math.prod(in_dims)), kernel.reshape(math.prod(in_dims), -1))
    y = checkpoint_name(y.reshape(*outer, *self.out_dims), PROJECTED)
    if self.has_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[num_in:])
      y += self.param("bias", init, self.out_dims, jnp.float32).astype(x.dtype)
    return y


class ExpertBank(nn.Module):
  """Returns one float32 kernel [E, in_dim, out_dim], to be applied by a grouped matrix product."""

  num_experts: int
  in_dim: int
  out_dim: int
  axes: tuple[str, str, str]
  scale: float = 1.0

  @nn.compact
  def __call__(self) -> Float[Array, "E D F"]:
    init = nn.with_logical_partitioning(fan_in_init(self.in_dim, self.scale), self.axes)
    return self.param("kernel", init, (self.num_experts, self.in_dim, self.out_dim), jnp.float32)


class Embedding(nn.Module):
  """A table [V, D] of token vectors.

  Attributes:
    scale: initial standard deviation. 1 makes tokens tell apart from the first step on; a table that also projects to
      the vocabulary needs it small.
  """

  vocab_size: int
  embed_dim: int
  scale: float

  @nn.compact
  def __call__(self) -> Float[Array, "V D"]:
    init = nn.with_logical_partitioning(nn.initializers.normal(self.scale), ("vocab", "embed"))
    return self.param("table", init, (self.vocab_size, self.embed_dim), jnp.float32)


class Unembedding(nn.Module):
  """A projection to the vocabulary, a row for each token, returned rather than applied: losses apply it in chunks."""

  vocab_size: int
  embed_dim: int

  @nn.compact
  def __call__(self) -> Float[Array, "V D"]:
    # Logits start with a standard deviation of 0.25: within 0.03 nats of uniform at any width, and yet far enough from
    # it that the layers below get distinct gradients at once. A tenth of this costs hundreds of steps.
    init = nn.with_logical_partitioning(fan_in_init(self.embed_dim, 0.25), ("vocab", "embed"))
    return self.param("kernel", init, (self.vocab_size, self.embed_dim), jnp.float32)
