"""Causal depthwise convolution over time that stops at document boundaries.

Letters: B batch  T length  D channels  W width.
"""

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
  W, T = kernel.shape[0], x.shape[1]
  if state is None:
    x = jnp.pad(x, ((0, 0), (W - 1, 0), (0, 0)))
    segments = jnp.pad(segment_ids, ((0, 0), (W - 1, 0)))
  else:
    x = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    segments = jnp.pad(segment_ids, ((0, 0), (W - 1, 0)), mode="edge")
  y = x[:, W - 1 :] * kernel[W - 1]
  for w in range(W - 1):
    is_same = segments[:, w : w + T] == segment_ids
    y += jnp.where(is_same[:, :, None], x[:, w : w + T], 0) * kernel[w]
  return y
