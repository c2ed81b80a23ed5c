"""Mixture of experts on the grouped matrix products of the tokamax package, which is not a dependency.

Letters: T tokens of the whole batch  K choices of a token  E experts  D embed  F expert width  S slots.
"""

from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels.experts import Bank
from ultrathink_jax.kernels.experts_pallas import BLOCK_ROWS, experts_by_product


def experts_tokamax(
  x: Float[Array, "T D"],
  choices: Int[Array, "T K"],
  gates: Float[Array, "T K"],
  gate_kernel: Float[Array, "E D F"] | Bank | None,
  up_kernel: Float[Array, "E D F"] | Bank,
  down_kernel: Float[Array, "E F D"] | Bank,
  capacity: int | None = None,
  activation: str = "swiglu",
) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
  """Returns what `experts` does.

  Raises:
    ConfigError: tokamax is not installed.
  """
  arrays = (x, choices, gates, gate_kernel, up_kernel, down_kernel)
  return experts_by_product(_product, *arrays, capacity, activation)


def _product(
  rows: Float[Array, "S D"], kernel: Float[Array, "E D F"], num_blocks: Int[Array, " E"]
) -> Float[Array, "S F"]:
  try:
    import tokamax
  except ImportError as error:
    raise ConfigError(
      "model.experts_backend='tokamax' needs the package tokamax; run pip install tokamax or choose 'pallas'"
    ) from error
  return tokamax.ragged_dot(rows, kernel, num_blocks * BLOCK_ROWS, preferred_element_type=rows.dtype)
