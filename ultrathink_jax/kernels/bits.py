"""bfloat16 arrays as bits.

To read or change a part of an array of bfloat16, or to transpose it, XLA on CPU makes float32 of all of it, and rounds
it again. Of its bits it does not.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def stored(array: Array) -> Array:
  """Returns the bits (uint16) of an array of bfloat16, any other array as it is. Carries no gradient."""
  return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def loaded(array: Array) -> Array:
  """Returns what `stored` was given."""
  return jax.lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array
