"""Mixture of feed-forward experts: the plain form that runs every expert on every token.

Source: arXiv:2101.03961 (capacity).
Letters: T tokens of the whole batch  K choices of a token  E experts  D embed  F expert width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.activation import activate
from ultrathink_jax.kernels.quantized import Quantized, in_dtype


def rank_in_expert(choices: Int[Array, "T K"], num_experts: int) -> Int[Array, "T K"]:
  """Returns how many choices of the same expert come before each one, in token order.

  Token order keeps dropping causal: a token never loses its place to a later token.
  """
  chosen = jax.nn.one_hot(choices.reshape(-1), num_experts, dtype=jnp.int32)
  return jnp.sum((jnp.cumsum(chosen, axis=0) - chosen) * chosen, axis=-1).reshape(choices.shape)


class Bank(NamedTuple):
  """The kernels of all experts, in few bits or not, and maybe what adapters add to them: a b, its scale in b."""

  kernel: Float[Array, "E D F"] | Quantized
  a: Float[Array, "E D r"] | None = None
  b: Float[Array, "E r F"] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.kernel.shape


def rounded(dtype: Any, *kernels: Float[Array, "E _ _"] | Bank | None) -> list[Float[Array, "E _ _"] | None]:
  """Returns the kernels, with what is added to them, in `dtype`, that of the tokens."""

  def whole(kernel: Float[Array, "E _ _"] | Bank) -> Float[Array, "E _ _"]:
    if not isinstance(kernel, Bank):
      return kernel.astype(dtype)
    if kernel.a is None:
      return in_dtype(kernel.kernel, dtype)
    added = jnp.einsum("edr,erf->edf", kernel.a, kernel.b, preferred_element_type=jnp.float32)
    return (in_dtype(kernel.kernel, jnp.float32) + added).astype(dtype)

  return [None if kernel is None else whole(kernel) for kernel in kernels]


def experts(
  x: Float[Array, "T D"],
  choices: Int[Array, "T K"],
  gates: Float[Array, "T K"],
  gate_kernel: Float[Array, "E D F"] | Bank | None,
  up_kernel: Float[Array, "E D F"] | Bank,
  down_kernel: Float[Array, "E F D"] | Bank,
  capacity: int | None = None,
  activation: str = "swiglu",
) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
  """Returns sum_k gates[t, k] expert_{choices[t, k]}(x[t]) and which choices were computed.

  An expert is down(activate(gate x, up x)), or down(activate(up x)) without `gate_kernel`, its kernels
  rounded to the dtype of x.

  A choice of E (one past the last expert) marks a token that is not to be routed. An expert takes the first
  `capacity` choices of it in token order and drops the others; None takes all.
  """
  E = up_kernel.shape[0]
  gate_kernel, up_kernel, down_kernel = rounded(x.dtype, gate_kernel, up_kernel, down_kernel)
  is_computed = choices < E
  if capacity is not None:
    is_computed &= rank_in_expert(choices, E) < capacity
  combine = jnp.einsum("tk,tke->te", gates * is_computed, jax.nn.one_hot(choices, E, dtype=gates.dtype))
  gate = None if gate_kernel is None else jnp.einsum("td,edf->tef", x, gate_kernel)
  hidden = activate(activation, gate, jnp.einsum("td,edf->tef", x, up_kernel))
  y = jnp.einsum("tef,efd,te->td", hidden, down_kernel, combine.astype(x.dtype))
  return y, is_computed
