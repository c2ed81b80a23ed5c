"""Values that are computed once and kept, where XLA would compute them again inside each of their readers."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from ultrathink_jax.platform import target_platform


def materialized(function: Callable[..., Any], *arrays: Any) -> Any:
  """Returns function(*arrays), not to be differentiated, as arrays of their own.

  XLA on CPU fuses whatever is elementwise, cosines and exponentials too, into every loop that reads it, once for each
  element of the larger array; an optimization barrier does not survive until then. A call that is not inlined does.
  """
  if target_platform() != "cpu":
    return function(*arrays)

  def inner(*arrays: Any) -> Any:
    with set_xla_metadata(inlineable="true"):  # calls inside, as of jnp.where, are not to be kept apart
      return function(*arrays)

  with set_xla_metadata(inlineable="false"):
    return jax.jit(inner)(*arrays)
