"""Mixture of SwiGLU experts: the plain form that runs every expert on every token.

Source: arXiv:2101.03961 (capacity), arXiv:2002.05202 (SwiGLU).
Letters: T tokens of the whole batch  K choices of a token  E experts  D embed  F expert width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rank_in_expert(choices: Int[Array, "T K"], num_experts: int) -> Int[Array, "T K"]:
  """Returns how many choices of the same expert come before each one, in token order.

  Token order keeps dropping causal: a token never loses its place to a later token.
  """
  chosen = jax.nn.one_hot(choices.reshape(-1), num_experts, dtype=jnp.int32)
  return jnp.sum((jnp.cumsum(chosen, axis=0) - chosen) * chosen, axis=-1).reshape(choices.shape)


def experts(
  x: Float[Array, "T D"],
  choices: Int[Array, "T K"],
  gates: Float[Array, "T K"],
  gate_kernel: Float[Array, "E D F"],
  up_kernel: Float[Array, "E D F"],
  down_kernel: Float[Array, "E F D"],
  capacity: int | None = None,
) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
  """Returns sum_k gates[t, k] expert_{choices[t, k]}(x[t]) and which choices were computed.

  A choice of E (one past the last expert) marks a token that is not to be routed. An expert takes the first
  `capacity` choices of it in token order and drops the others; None takes all.
  """
  E = gate_kernel.shape[0]
  is_computed = choices < E
  if capacity is not None:
    is_computed &= rank_in_expert(choices, E) < capacity
  combine = jnp.einsum("tk,tke->te", gates * is_computed, jax.nn.one_hot(choices, E, dtype=gates.dtype))
  hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate_kernel)) * jnp.einsum("td,edf->tef", x, up_kernel)
  y = jnp.einsum("tef,efd,te->td", hidden, down_kernel, combine.astype(x.dtype))
  return y, is_computed
