"""Trains hybrid attention / Mamba-2 / mixture-of-experts language models in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ultrathink_jax.api import Model as Model
  from ultrathink_jax.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """Imports the interactive interface when it is first asked for, so that the command line starts at once."""
  if name in ("load", "Model"):
    from ultrathink_jax import api

    return getattr(api, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
