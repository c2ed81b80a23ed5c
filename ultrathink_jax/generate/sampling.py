"""How the next token is chosen from logits.

Letters: B batch  V vocab.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key


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


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | float) -> Array:
  """Returns logits with those of seen tokens made less likely by `penalty` > 1; 1 changes nothing."""
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likeliest(
  logits: Float[Array, "B V"], top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Float[Array, "B V"]:
  """Returns logits with -inf outside the top k and outside the nucleus of mass p; the likeliest token always stays."""
  V = logits.shape[-1]
  order = jnp.argsort(-logits, axis=-1)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  rank = jnp.arange(V)
  ranked = jnp.where(rank < jnp.where(top_k > 0, top_k, V), ranked, -jnp.inf)
  probabilities = jax.nn.softmax(ranked, axis=-1)
  mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
  ranked = jnp.where((rank == 0) | (mass_before < top_p), ranked, -jnp.inf)
  return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample(
  keys: Key[Array, " B"], logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: Sampling
) -> Int[Array, " B"]:
  """Returns the next token of each row; row i depends on its own key, logits and history only."""
  logits = penalize(logits, seen, sampling.repetition_penalty)
  if sampling.is_greedy:
    return jnp.argmax(logits, axis=-1)
  logits = keep_likeliest(logits / sampling.temperature, sampling.top_k, sampling.top_p)
  return jax.vmap(jax.random.categorical)(keys, logits)
