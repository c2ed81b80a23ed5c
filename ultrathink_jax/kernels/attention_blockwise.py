"""Attention over packed rows, one block of queries at a time, so that scores no query can see are never computed.

Letters: B batch  T length  N query heads  K kv heads  H head dim.
"""

import jax
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.attention import attention

_BLOCK_TOKENS = 128
_MAX_BLOCKS = 16


def attention_blockwise(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  query_positions: Int[Array, "B T"],
  key_positions: Int[Array, "B T"],
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B T"],
  window_tokens: int | None = None,
) -> Float[Array, "B T N H"]:
  """Returns what `attention` does for rows in document order, where no query sees a key of a higher index.

  Scores are recomputed in the backward pass: memory is one block of them, not T x T.
  """
  T = query.shape[1]
  block = max(_BLOCK_TOKENS, -(-T // _MAX_BLOCKS))
  one_block = jax.checkpoint(attention, static_argnums=(7,))
  outs = []
  for start in range(0, T, block):
    queries = slice(start, min(start + block, T))
    keys = slice(0 if window_tokens is None else max(0, start - window_tokens + 1), queries.stop)
    outs.append(
      one_block(
        query[:, queries],
        key[:, keys],
        value[:, keys],
        query_positions[:, queries],
        key_positions[:, keys],
        query_segments[:, queries],
        key_segments[:, keys],
        window_tokens,
      )
    )
  return jax.numpy.concatenate(outs, axis=1)
