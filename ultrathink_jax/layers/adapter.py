"""What an adapter adds to a projection, and the weight matrices that it stands for.

Source: arXiv:2106.09685 (LoRA), arXiv:2402.09353 (DoRA), arXiv:2404.02948 (PiSSA).
Letters: T tokens  D in  F out  r rank.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.matmul import matmul
from ultrathink_jax.kernels.quantized import Quantized
from ultrathink_jax.types import Adapter


def adapted(
  x: Float[Array, "T D"],
  y: Float[Array, "T F"],
  kernel: Float[Array, "D F"] | Quantized,
  adapter: Adapter,
  make_key: Callable[[], Key[Array, ""]],
) -> Float[Array, "T F"]:
  """Returns y = x kernel as the adapter changes it, in the dtype of x.

  An adapter that adds nothing changes no bit. `make_key` is called where inputs are dropped, and the kernel is read, as
  numbers, where the adapter has a magnitude.
  """
  if adapter.dropout is not None:
    keep = 1 - adapter.dropout
    x = jnp.where(jax.random.bernoulli(make_key(), keep, x.shape), x / keep.astype(x.dtype), 0)
  scale = adapter.scale.astype(x.dtype)
  added = matmul(matmul(x, adapter.a), adapter.b)
  if adapter.a0 is not None:
    added -= matmul(matmul(x, adapter.a0), adapter.b0)
  y += scale * added
  if adapter.magnitude is None:
    return y
  lengths = jax.lax.stop_gradient(column_lengths(merged(kernel, adapter._replace(magnitude=None))))
  return y * (adapter.magnitude / lengths).astype(x.dtype)


def merged(kernel: Float[Array, "*stack D F"], adapter: Adapter) -> Float[Array, "*stack D F"]:
  """Returns the float32 matrices by which a projection with this adapter multiplies, those of experts side by side."""
  scale = adapter.scale.reshape(adapter.scale.shape + (1,) * (kernel.ndim - adapter.scale.ndim))
  added = _product(adapter.a, adapter.b)
  if adapter.a0 is not None:
    added -= _product(adapter.a0, adapter.b0)
  kernel = kernel.astype(jnp.float32) + scale * added
  if adapter.magnitude is None:
    return kernel
  return kernel * (adapter.magnitude / column_lengths(kernel))[..., None, :]


def column_lengths(kernel: Float[Array, "*stack D F"]) -> Float[Array, "*stack F"]:
  """Returns the length of every column: the same bits in a stack as alone, which a sum of another shape has not."""
  if kernel.ndim > 2:
    return jax.lax.map(column_lengths, kernel)
  return materialized(lambda k: jnp.sqrt(jnp.sum(jnp.square(k), axis=-2)), kernel.astype(jnp.float32))


def _product(a: Float[Array, "*stack D r"], b: Float[Array, "*stack r F"]) -> Float[Array, "*stack D F"]:
  return jnp.einsum("...dr,...rf->...df", a, b, preferred_element_type=jnp.float32)
