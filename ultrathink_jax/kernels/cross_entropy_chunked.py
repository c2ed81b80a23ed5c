"""Cross-entropy that never holds [B, T, V]: logits of a few columns of time at once, gradients taken on the spot.

The loss is a weighted sum, so its gradient with respect to the logits is known as soon as they are: the forward pass
of a differentiated call forms the gradients of `hidden` and `kernel` chunk by chunk, and no logit is computed twice.

Letters: B batch  T length  D embed  V vocab.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.cross_entropy import soft_cap

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


def _logits_and_loss(hidden, kernel, targets, weights, cap):
  logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
  logits = soft_cap(logits, cap)
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return logits, normalizer, jnp.sum(weights * (normalizer - target_logits))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(hidden, kernel, targets, weights, cap, chunk: int):
  def add(total, inputs):
    hidden, targets, weights = inputs
    return total + _logits_and_loss(hidden, kernel.astype(hidden.dtype), targets, weights, cap)[-1], None

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  return jax.lax.scan(add, jnp.float32(0), chunks)[0]


def _loss_forward(hidden, kernel, targets, weights, cap, chunk: int):
  def add(carry, inputs):
    total, kernel_gradient = carry
    hidden, targets, weights = inputs
    logits, normalizer, loss = _logits_and_loss(hidden, kernel.astype(hidden.dtype), targets, weights, cap)
    is_target = jnp.arange(kernel.shape[1]) == targets[..., None]
    gradient = weights[..., None] * (jnp.exp(logits - normalizer[..., None]) - is_target)
    if cap is not None:
      gradient *= 1 - jnp.square(logits / cap)
    gradient = gradient.astype(hidden.dtype)
    hidden_gradient = jnp.einsum("btv,dv->btd", gradient, kernel.astype(hidden.dtype))
    kernel_gradient += jnp.einsum("btd,btv->dv", hidden, gradient, preferred_element_type=jnp.float32)
    return (total + loss, kernel_gradient), hidden_gradient

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  start = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32))
  (total, kernel_gradient), hidden_gradient = jax.lax.scan(add, start, chunks)
  hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(hidden.shape)
  return total, (hidden_gradient, kernel_gradient.astype(kernel.dtype))


def _loss_backward(chunk: int, residuals, scale):
  hidden_gradient, kernel_gradient = residuals
  return hidden_gradient * scale.astype(hidden_gradient.dtype), kernel_gradient * scale, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)
