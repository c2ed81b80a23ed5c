"""How the next token is chosen from logits, without sorting the vocabulary where that can be helped.

A token is drawn by one uniform number, as the place where the running sum of probabilities passes it. Top k and top p
look at a few hundred of the likeliest tokens; only what reaches further down ranks the whole vocabulary.

Letters: B batch  V vocab  N candidates.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

_CANDIDATES = 256  # ranked to begin with
_BLOCK = 256  # numbers summed at once
_BELOW_ONE = 1 - 2**-23  # times a float32 it is less than that


@struct.dataclass
class Sampling:
  """The settings of a call, as values: changing one recompiles nothing but the switch between greedy and not.

  Attributes:
    is_greedy: take the likeliest token.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: then keep the fewest likeliest tokens whose probability reaches p.
    repetition_penalty: divides positive and multiplies negative logits of tokens already seen (arXiv:1909.05858).
  """

  is_greedy: bool = struct.field(pytree_node=False)
  temperature: Float[Array, ""] | float
  top_k: Int[Array, ""] | int
  top_p: Float[Array, ""] | float
  repetition_penalty: Float[Array, ""] | float


def sample(
  keys: Key[Array, " B"], logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Int[Array, " B"]:
  """Returns the next token of each row; row i depends on its own key, logits and history only."""
  V = logits.shape[-1]
  logits = penalize(logits, seen, sampling.repetition_penalty)
  if sampling.is_greedy:
    return _likeliest(logits)
  top_k = jnp.where(sampling.top_k > 0, sampling.top_k, V)
  highest = jnp.max(logits, axis=-1, keepdims=True)
  powers = lambda logits: jnp.exp((logits - highest) / sampling.temperature)
  uniform = jax.vmap(jax.random.uniform)(keys)

  def from_all() -> Array:
    return _draw(powers(logits), uniform)

  def from_likeliest() -> Array:
    total = jnp.sum(powers(logits), axis=-1)
    ranked, tokens = jax.lax.top_k(logits, min(_CANDIDATES, V))
    reaches_p = jnp.sum(powers(ranked), axis=-1) >= sampling.top_p * total
    is_enough = (top_k <= ranked.shape[-1]) | ((top_k >= V) & jnp.all(reaches_p))

    def choose(ranked: Array, tokens: Array) -> Array:
      kept = keep_likeliest(powers(ranked), total, top_k, sampling.top_p)
      return jnp.take_along_axis(tokens, _draw(kept, uniform)[:, None], axis=-1)[:, 0]

    return jax.lax.cond(is_enough, lambda: choose(ranked, tokens), lambda: choose(*jax.lax.top_k(logits, V)))

  return jax.lax.cond((top_k >= V) & (sampling.top_p >= 1), from_all, from_likeliest)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | float) -> Array:
  """Returns logits with those of seen tokens made less likely by `penalty` > 1; 1 changes nothing."""
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likeliest(
  ranked: Float[Array, "B N"], total: Float[Array, " B"], top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Float[Array, "B N"]:
  """Returns probabilities with 0 after the first k and after those whose sum reaches the part p of what k leaves.

  `ranked` are the likeliest tokens' probabilities, highest first, to a common factor. `total` is the sum of all
  tokens', of which k leaves all where it is more than N. The likeliest token always stays.
  """
  N = ranked.shape[-1]
  rank = jnp.arange(N)
  ranked = jnp.where(rank < top_k, ranked, 0)
  total = jnp.where(top_k <= N, jnp.sum(ranked, axis=-1), total)
  before = jnp.cumsum(ranked, axis=-1) - ranked
  is_kept = (rank == 0) | (before < top_p * total[:, None]) | (top_p >= 1)
  return jnp.where(is_kept, ranked, 0)


def _likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
  """Returns what jnp.argmax does: XLA on CPU takes twenty times as long for an index as for a maximum."""
  V = logits.shape[-1]
  is_highest = logits == jnp.max(logits, axis=-1, keepdims=True)
  return jnp.minimum(jnp.min(jnp.where(is_highest, jnp.arange(V), V), axis=-1), V - 1)


def _draw(weights: Float[Array, "B N"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
  """Returns the place in each row where the running sum of its weights passes `uniform` < 1 of their sum.

  A place of weight 0 is never drawn. Sums are by blocks: first the block, then the place in it.
  """
  B, N = weights.shape
  blocks = jnp.pad(weights, ((0, 0), (0, -N % _BLOCK))).reshape(B, -1, _BLOCK)
  sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
  block, rest = _passed(sums, uniform * sums[:, -1])
  in_block = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  place, _ = _passed(jnp.cumsum(in_block, axis=-1), rest)
  return block * _BLOCK + place


def _passed(sums: Float[Array, "B N"], target: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """Returns the first place whose running sum is above the target, and what the target is above the one before.

  A target that rounding has put at the last sum or above it counts as just below.
  """
  target = jnp.minimum(target, sums[:, -1] * _BELOW_ONE)[:, None]
  place = jnp.sum(sums <= target, axis=-1)
  before = jnp.take_along_axis(jnp.pad(sums, ((0, 0), (1, 0))), place[:, None], axis=-1)
  return place, (target - before)[:, 0]
