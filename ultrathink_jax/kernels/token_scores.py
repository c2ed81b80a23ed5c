"""How well a model predicts each target, without gradient; logits of a few columns of time exist at once.

Letters: B batch  T length  t time of a chunk  D embed  V vocab.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.cross_entropy_chunked import chunk_length
from ultrathink_jax.kernels.soft_cap import Cap, soft_cap


class TokenScores(NamedTuple):
  """Attributes:
  nats: logsumexp(logits) - logits[target], float32.
  is_best: whether the target is what greedy decoding chooses, the first token with the highest logit.
  """

  nats: Float[Array, "B T"]
  is_best: Bool[Array, "B T"]


def token_scores(
  hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], cap: Cap = None
) -> TokenScores:
  """Returns the scores of every target; the float32 logits are hidden table^T, softly capped."""
  B, T, _ = hidden.shape
  table = table.astype(hidden.dtype)
  chunk = chunk_length(B, T, table.shape[0])

  def score(inputs: tuple[Float[Array, "B t D"], Int[Array, "B t"]]) -> TokenScores:
    hidden, targets = inputs
    logits = soft_cap(jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32), cap)
    of_targets = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return TokenScores(jax.nn.logsumexp(logits, axis=-1) - of_targets, jnp.argmax(logits, axis=-1) == targets)

  split = lambda array: jnp.moveaxis(array.reshape(B, T // chunk, chunk, *array.shape[2:]), 1, 0)
  chunks = jax.lax.map(score, (split(hidden), split(targets)))
  return TokenScores(*(jnp.moveaxis(array, 0, 1).reshape(B, T) for array in chunks))
