"""Cross-entropy that never holds [B, T, V]: logits of a few columns of time at once, gradients taken on the spot.

The loss is a weighted sum, so its gradient with respect to the logits is known as soon as they are: the forward pass
of a differentiated call forms the gradients of `hidden` and `kernel` chunk by chunk, and no logit is computed twice.

Letters: B batch  T length  D embed  V vocab  R rows of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.cross_entropy import cross_entropy, soft_cap
from ultrathink_jax.kernels.matmul import transposed_product

_MAX_CHUNK_LOGITS = 2**25  # 128 MiB of float32


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
  """Returns the largest divisor of `length` whose logits stay within the chunk budget, at least 1."""
  most = max(1, _MAX_CHUNK_LOGITS // (batch * vocab_size))
  return max(size for size in range(1, length + 1) if length % size == 0 and size <= most)


def cross_entropy_chunked(
  hidden: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  cap: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
  """Returns what `cross_entropy` does, differentiable in `hidden` and `kernel`."""
  B, T, _ = hidden.shape
  return _loss(hidden, kernel, targets, weights, cap, chunk_length(B, T, kernel.shape[1]))


def _split(array: Array, chunk: int) -> Array:
  """Returns [B, T, ...] as [T / chunk, B, chunk, ...]."""
  B, T = array.shape[:2]
  return jnp.moveaxis(array.reshape(B, T // chunk, chunk, *array.shape[2:]), 1, 0)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(hidden, kernel, targets, weights, cap, chunk: int):
  def add(total, inputs):
    hidden, targets, weights = inputs
    return total + cross_entropy(hidden, kernel, targets, weights, cap), None

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  return jax.lax.scan(add, jnp.float32(0), chunks)[0]


def _loss_forward(hidden, kernel, targets, weights, cap, chunk: int):
  D = hidden.shape[-1]
  kernel_in_dtype = kernel.astype(hidden.dtype)

  def add(carry, inputs):
    total, kernel_gradient = carry
    rows, targets, weights = inputs[0].reshape(-1, D), inputs[1].reshape(-1), inputs[2].reshape(-1, 1)
    logits = soft_cap(jnp.einsum("rd,dv->rv", rows, kernel_in_dtype, preferred_element_type=jnp.float32), cap)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    # One exponential a logit: softmax is powers / normalizer, and the narrow sides of products take the division.
    powers = jnp.exp(logits - highest)
    normalizer = jnp.sum(powers, axis=-1, keepdims=True)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = jnp.sum(weights * (jnp.log(normalizer) + highest - target_logits))
    gradient = _subtract_at(powers, targets, normalizer)
    if cap is not None:
      gradient *= 1 - jnp.square(logits / cap)
    gradient, scale = gradient.astype(rows.dtype), weights / normalizer
    rows_gradient = scale * jnp.einsum("rv,dv->rd", gradient, kernel_in_dtype, preferred_element_type=jnp.float32)
    kernel_gradient += transposed_product((rows * scale).astype(rows.dtype), gradient)
    return (total + loss, kernel_gradient), rows_gradient.astype(rows.dtype).reshape(inputs[0].shape)

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  start = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32))
  (total, kernel_gradient), hidden_gradient = jax.lax.scan(add, start, chunks)
  hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(hidden.shape)
  return total, (hidden_gradient, kernel_gradient.astype(kernel.dtype))


def _subtract_at(array: Float[Array, "R V"], columns: Int[Array, " R"], values: Float[Array, "R 1"]) -> Array:
  """Returns array with values[r] subtracted from array[r, columns[r]].

  On CPU in place. Elsewhere by a comparison, which fuses with its neighbours and stays local where V is sharded.
  """
  if jax.default_backend() == "cpu":
    return array.at[jnp.arange(columns.size), columns].add(-values[:, 0], unique_indices=True)
  return jnp.where(jnp.arange(array.shape[1]) == columns[:, None], array - values, array)


def _loss_backward(chunk: int, residuals, scale):
  hidden_gradient, kernel_gradient = residuals
  return hidden_gradient * scale.astype(hidden_gradient.dtype), kernel_gradient * scale, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)
