"""The projection every weight matrix goes through, and the banks of expert matrices.

Letters: E experts  D embed  F expert width.
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ultrathink_jax.kernels.experts import Bank
from ultrathink_jax.kernels.matmul import matmul
from ultrathink_jax.kernels.per_token import per_token
from ultrathink_jax.kernels.quantized import dequantize
from ultrathink_jax.layers.adapter import adapted, merged
from ultrathink_jax.parallel.sharding import is_spread
from ultrathink_jax.types import Adapter

PROJECTED = "projected"  # what a projection returns, by which remat policies know it
ADAPTERS, QUANTIZED = "lora", "quantized"  # collections beside "params"


def fan_in_init(fan_in: int, scale: float = 1.0) -> nn.initializers.Initializer:
  """Returns a normal of standard deviation scale / sqrt(fan_in), cut at two deviations."""
  return nn.initializers.truncated_normal(scale * fan_in**-0.5)


class _Weighted(nn.Module):
  """A module with one kernel, in few bits or not, and maybe an adapter of it."""

  def _kernel(self, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Returns the kernel: a float32 parameter of this shape, or in `dtype` what a quantized one stands for."""
    if not self.has_variable(QUANTIZED, "kernel"):
      return self.param("kernel", init, shape, jnp.float32)
    kernel = dequantize(self.get_variable(QUANTIZED, "kernel"), dtype)
    return kernel.reshape(shape)

  def _adapter(self) -> Adapter | None:
    return self.get_variable(ADAPTERS, "adapter") if self.has_variable(ADAPTERS, "adapter") else None


class Projection(_Weighted):
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
    whole = lambda: self._kernel(init, (*in_dims, *self.out_dims), x.dtype).reshape(math.prod(in_dims), -1)
    is_quantized = self.has_variable(QUANTIZED, "kernel")
    kernel = self.get_variable(QUANTIZED, "kernel") if is_quantized else whole()
    outer, rows = x.shape[: x.ndim - num_in], x.reshape(-1, math.prod(in_dims))
    y, adapter = matmul(rows, kernel), self._adapter()
    if adapter is not None:
      kernel = whole() if is_quantized and adapter.magnitude is not None else kernel
      y = adapted(rows, y, kernel, adapter, lambda: self.make_rng(ADAPTERS))
    y = checkpoint_name(y.reshape(*outer, *self.out_dims), PROJECTED)
    if self.has_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[num_in:])
      y += per_token(self.param("bias", init, self.out_dims, jnp.float32), outer).astype(x.dtype)
    return y


class ExpertBank(_Weighted):
  """Returns one kernel [E, in_dim, out_dim], to be applied in `dtype` by a grouped matrix product.

  On one device an adapter, and a kernel in few bits, stay as they are, in a Bank. Over a mesh they are worked into the
  kernel of the layer.
  """

  num_experts: int
  in_dim: int
  out_dim: int
  axes: tuple[str, str, str]
  dtype: jnp.dtype
  scale: float = 1.0

  @nn.compact
  def __call__(self) -> Float[Array, "E D F"] | Bank:
    init = nn.with_logical_partitioning(fan_in_init(self.in_dim, self.scale), self.axes)
    shape, adapter = (self.num_experts, self.in_dim, self.out_dim), self._adapter()
    if is_spread() or (adapter is not None and adapter.a0 is not None):
      kernel = self._kernel(init, shape, self.dtype)
      return kernel if adapter is None else merged(kernel, adapter)
    factors = () if adapter is None else (adapter.a, adapter.scale * adapter.b)
    if self.has_variable(QUANTIZED, "kernel"):
      return Bank(self.get_variable(QUANTIZED, "kernel"), *factors)
    kernel = self._kernel(init, shape, self.dtype)
    return Bank(kernel, *factors) if factors else kernel


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
