"""The matrix product of a projection, with a gradient that reads the output's gradient from memory.

Letters: T tokens  D in  F out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.quantized import Quantized, in_dtype
from ultrathink_jax.platform import target_platform

_TRANSPOSED_BLOCK = 256


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


def _product(spec: str, x: Array, y: Array) -> Array:
  """Returns the product, accumulated in float32; on CPU also given in it, which is what its bfloat16 units make."""
  on_cpu = target_platform() == "cpu"
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32 if on_cpu else None)


def transposed_product(x: Float[Array, "T D"], y: Float[Array, "T *F"]) -> Float[Array, "D *F"]:
  """Returns x^T y in float32.

  XLA on CPU has fast bfloat16 products, several times as fast as float32, for every order of operands but this one.
  There x is first transposed by products with the identity, which are exact.
  """
  if x.dtype != jnp.bfloat16 or target_platform() != "cpu":
    return jnp.einsum("td,t...->d...", x, y, preferred_element_type=jnp.float32)
  blocks = [x[:, start : start + _TRANSPOSED_BLOCK] for start in range(0, x.shape[1], _TRANSPOSED_BLOCK)]
  transposed = [
    _product("cd,td->ct", jnp.eye(block.shape[1], dtype=x.dtype), block).astype(x.dtype) for block in blocks
  ]
  return _product("dt,t...->d...", jnp.concatenate(transposed), y)
