"""Causal depthwise convolution over time that stops at document boundaries.

Letters: B batch  T length  D channels  W width  S = T + W - 1: the inputs, W - 1 earlier ones before them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def conv1d(
  x: Float[Array, "B T D"],
  kernel: Float[Array, "W D"],
  segment_ids: Int[Array, "B T"],
  state: Float[Array, "B W-1 D"] | None = None,
) -> Float[Array, "B T D"]:
  """Returns sum_w kernel[w] x[t - (W - 1) + w] over the inputs of t's own document.

  `state` are the W - 1 inputs before x, oldest first, taken to belong to the document of the first token; without it
  nothing comes before.
  """
  border = kernel.shape[0] - 1
  if state is None:
    x = jnp.pad(x, ((0, 0), (border, 0), (0, 0)))
    segments = jnp.pad(segment_ids, ((0, 0), (border, 0)))
  else:
    x = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    segments = jnp.pad(segment_ids, ((0, 0), (border, 0)), mode="edge")
  return _convolve(x, kernel, segments)


@jax.custom_vjp
def _convolve(x: Float[Array, "B S D"], kernel: Float[Array, "W D"], segments: Int[Array, "B S"]) -> Array:
  """Returns y [B, T, D]. The backward pass is written out, so that it is one pass over time for each gradient."""
  W = kernel.shape[0]
  y = x[:, W - 1 :] * kernel[W - 1]
  for w in range(W - 1):
    y += _read(x, segments, w, W) * kernel[w]
  return y


def _read(x: Float[Array, "B S D"], segments: Int[Array, "B S"], w: int, width: int) -> Float[Array, "B T D"]:
  """Returns what y reads through kernel[w]: 0 of another document."""
  T = x.shape[1] - width + 1
  is_same = segments[:, w : w + T] == segments[:, width - 1 :]
  return jnp.where(is_same[:, :, None], x[:, w : w + T], 0)


def _convolve_forward(x, kernel, segments):
  return _convolve(x, kernel, segments), (x, kernel, segments)


def _convolve_backward(residuals, gradient):
  x, kernel, segments = residuals
  (W, _), S = kernel.shape, x.shape[1]
  read_by = jnp.pad(gradient, ((0, 0), (W - 1, W - 1), (0, 0)))
  readers = jnp.pad(segments[:, W - 1 :], ((0, 0), (W - 1, W - 1)), constant_values=-1)
  x_gradient = 0
  for w in range(W):
    later = slice(W - 1 - w, W - 1 - w + S)
    is_same = readers[:, later] == segments
    x_gradient += jnp.where(is_same[:, :, None], read_by[:, later], 0) * kernel[w]
  kernel_gradient = [jnp.sum(gradient * _read(x, segments, w, W), axis=(0, 1), dtype=jnp.float32) for w in range(W)]
  return x_gradient, jnp.stack(kernel_gradient).astype(kernel.dtype), None


_convolve.defvjp(_convolve_forward, _convolve_backward)
