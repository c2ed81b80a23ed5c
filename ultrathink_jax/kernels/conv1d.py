"""The short causal convolution of Mamba: depthwise, over time, with a bias and SiLU; it stops at document boundaries.

Letters: B batch  T length  D channels  W width  S = T + W - 1: the inputs, W - 1 earlier ones before them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.per_token import sum_over_tokens


def conv1d(
  x: Float[Array, "B T D"],
  kernel: Float[Array, "W D"],
  bias: Float[Array, " D"] | None,
  segment_ids: Int[Array, "B T"],
  state: Float[Array, "B W-1 D"] | None = None,
) -> Float[Array, "B T D"]:
  """Returns SiLU(bias + sum_w kernel[w] x[t - (W - 1) + w]) over the inputs of t's own document.

  Computed in float32, given in the dtype of x. `state` are the W - 1 inputs before x, oldest first, taken to belong to
  the document of the first token; without it nothing comes before.
  """
  border = kernel.shape[0] - 1
  if state is None:
    x = jnp.pad(x, ((0, 0), (border, 0), (0, 0)))
    segments = jnp.pad(segment_ids, ((0, 0), (border, 0)))
  else:
    x = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    segments = jnp.pad(segment_ids, ((0, 0), (border, 0)), mode="edge")
  return _convolve(x, kernel, bias, segments)


@jax.custom_vjp
def _convolve(x: Float[Array, "B S D"], kernel, bias, segments: Int[Array, "B S"]) -> Float[Array, "B T D"]:
  return _forward(x, kernel, bias, segments)[0]


def _forward(x, kernel, bias, segments):
  """Returns the outputs, and what the backward pass needs: the sums that SiLU is taken of, beside the arguments.

  All that follows reads the outputs, and would convolve for itself if they were not arrays of their own.
  """
  sums = materialized(_filter, x, kernel, bias, segments)
  outputs = materialized(lambda sums: jax.nn.silu(sums.astype(jnp.float32)).astype(sums.dtype), sums)
  return outputs, (x, kernel, bias, segments, sums)


def _filter(x, kernel, bias, segments):
  W = kernel.shape[0]
  sums = sum(_read(x, segments, w, W) * kernel[w] for w in range(W))
  return (sums if bias is None else sums + bias).astype(x.dtype)


def _read(x: Float[Array, "B S D"], segments: Int[Array, "B S"], w: int, width: int) -> Float[Array, "B T D"]:
  """Returns what an output reads through kernel[w]: 0 of another document; float32."""
  T = x.shape[1] - width + 1
  is_same = segments[:, w : w + T] == segments[:, width - 1 :]
  return jnp.where(is_same[:, :, None], x[:, w : w + T], 0).astype(jnp.float32)


def _backward(residuals, gradient):
  x, kernel, bias, segments, sums = residuals
  gradient = materialized(_before_silu, sums, gradient)
  x_gradient = _scatter(gradient, kernel, segments, x.shape[1])
  W = kernel.shape[0]
  through = [sum_over_tokens(gradient.astype(jnp.float32) * _read(x, segments, w, W)) for w in range(W)]
  kernel_gradient = jnp.stack(through).astype(kernel.dtype)
  bias_gradient = None if bias is None else sum_over_tokens(gradient).astype(bias.dtype)
  return x_gradient, kernel_gradient, bias_gradient, None


def _before_silu(sums, gradient):
  sums32, gradient32 = sums.astype(jnp.float32), gradient.astype(jnp.float32)
  opening = jax.nn.sigmoid(sums32)
  return (gradient32 * opening * (1 + sums32 * (1 - opening))).astype(gradient.dtype)


def _scatter(gradient: Float[Array, "B T D"], kernel, segments: Int[Array, "B S"], length: int) -> Array:
  """Returns the gradient of x [B, S, D], whose S is `length`: of each input, what its readers' gradients give it."""
  W = kernel.shape[0]
  read_by = jnp.pad(gradient, ((0, 0), (W - 1, W - 1), (0, 0)))
  readers = jnp.pad(segments[:, W - 1 :], ((0, 0), (W - 1, W - 1)), constant_values=-1)
  x_gradient = 0
  for w in range(W):
    later = slice(W - 1 - w, W - 1 - w + length)
    is_same = readers[:, later] == segments
    x_gradient += jnp.where(is_same[:, :, None], read_by[:, later], 0).astype(jnp.float32) * kernel[w]
  return x_gradient.astype(gradient.dtype)


_convolve.defvjp(_forward, _backward)
