"""The matrix product of a projection, with a gradient that reads the output's gradient from memory.

Letters: T tokens  D in  F out.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ultrathink_jax.kernels.bits import loaded, stored
from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.quantized import Quantized, in_dtype
from ultrathink_jax.platform import is_one_cpu, target_platform

_TILE = 32


@jax.custom_vjp
def matmul(x: Float[Array, "T D"], kernel: Float[Array, "D F"] | Quantized) -> Float[Array, "T F"]:
  """Returns x kernel in the dtype of x; the float32 kernel is rounded to it first, its gradient is float32.

  A kernel in few bits has no gradient, and it is what the backward pass is left, which makes numbers of it again. Each
  product does so for itself: XLA would do it once for both, and keep the numbers of all layers that are written out.

  In the backward pass both products read the output's gradient. Left to itself, XLA on CPU computes whatever made that
  gradient a second time, element by element in transposed order, inside the copy it makes for the kernel's product:
  several times slower than the product itself.
  """
  return _times("td,df->tf", x, kernel)


def _times(spec: str, x: Array, kernel: Float[Array, "D F"] | Quantized) -> Array:
  product = lambda x, kernel: _product(spec, x, in_dtype(kernel, x.dtype)).astype(x.dtype)
  return materialized(product, x, kernel) if isinstance(kernel, Quantized) else product(x, kernel)


def _forward(x, kernel):
  return matmul(x, kernel), (x, kernel)


def _backward(residuals, gradient):
  x, kernel = residuals
  gradient = jax.lax.optimization_barrier(gradient)
  x_gradient = _times("tf,df->td", gradient, kernel)
  if isinstance(kernel, Quantized):
    return x_gradient, None
  return x_gradient, transposed_product(x, gradient).astype(kernel.dtype)


matmul.defvjp(_forward, _backward)


def _product(spec: str, x: Float[Array, "T _"], y: Array) -> Array:
  """Returns the product, accumulated in float32; on CPU also given in it, which is what its bfloat16 units make."""
  on_cpu = target_platform() == "cpu"
  return in_two_rows(lambda x: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32 if on_cpu else None), x)


def in_two_rows(product: Callable[[Array], Array], x: Float[Array, "T D"]) -> Array:
  """Returns product(x); on CPU a single bfloat16 row is multiplied as two, which takes a third of the time.

  XLA makes float32 of a matrix that it multiplies by a vector itself.
  """
  if x.shape[0] > 1 or x.dtype != jnp.bfloat16 or target_platform() != "cpu":
    return product(x)
  return product(jnp.concatenate([x, x]))[:1]


def transposed_product(x: Float[Array, "T D"], y: Float[Array, "T *F"]) -> Float[Array, "D *F"]:
  """Returns x^T y in float32.

  XLA on CPU has fast products for every order of operands but this one: there bfloat16 is several times as slow, and
  float32 is where results have no more columns than rows. So x is transposed first.
  """
  has_many_columns = math.prod(y.shape[1:]) > x.shape[1]
  if not is_one_cpu() or (has_many_columns and x.dtype == jnp.float32):
    return jnp.einsum("td,t...->d...", x, y, preferred_element_type=jnp.float32)
  return _product("dt,t...->d...", transposed(x), y)


@jax.custom_vjp
def transposed(x: Float[Array, "... T D"]) -> Float[Array, "... D T"]:
  """Returns the last two dims in the other order; on a CPU from memory to memory.

  Left to itself, XLA leaves a transpose to the product that reads it, which is what this is to avoid, or fuses it with
  whatever made x, element by element in the order of the result. Even dims are split, so that it does not take this for
  an array of another layout.
  """
  if not is_one_cpu():
    return x.swapaxes(-2, -1)
  *batch, T, D = x.shape
  t, d = math.gcd(_TILE, T), math.gcd(_TILE, D)

  def move(x: Array) -> Array:
    tiles = stored(x).reshape(*batch, T // t, t, D // d, d)
    return loaded(jnp.moveaxis(tiles, (-4, -3), (-2, -1)).reshape(*batch, D, T))

  return materialized(move, x)


transposed.defvjp(lambda x: (transposed(x), None), lambda _, gradient: (transposed(gradient),))
