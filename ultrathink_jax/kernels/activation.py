"""The activations of feed-forward layers and experts.

Source: arXiv:2002.05202 (gated), arXiv:2109.08668 (squared ReLU).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Activation(NamedTuple):
  """`function` of the gate where `is_gated` (the up projection multiplies it), else of the up projection itself."""

  function: Callable[[Array], Array]
  is_gated: bool


_gelu = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Activation] = {
  "swiglu": Activation(jax.nn.silu, True),
  "geglu": Activation(_gelu, True),
  "gelu": Activation(_gelu, False),
  "relu2": Activation(lambda x: jnp.square(jax.nn.relu(x)), False),
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(name: str, gate: Array | None, up: Array) -> Array:
  """Returns the hidden units of a feed-forward layer; `gate` is None where the activation has none.

  Computed in float32, given in the dtype of `up`. The backward pass keeps `gate` and `up` alone.
  """
  return _activate(name, gate, up)


def _activate(name: str, gate: Array | None, up: Array) -> Array:
  function, is_gated = ACTIVATIONS[name]
  up32 = up.astype(jnp.float32)
  return (function(gate.astype(jnp.float32)) * up32 if is_gated else function(up32)).astype(up.dtype)


def _forward(name, gate, up):
  return _activate(name, gate, up), (gate, up)


def _backward(name, residuals, gradient):
  _, pullback = jax.vjp(partial(_activate, name), *residuals)
  return pullback(gradient)


activate.defvjp(_forward, _backward)
