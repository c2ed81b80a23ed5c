"""What an adapter directory holds, in our names and layouts, and the scale of its updates."""

import math
from typing import NamedTuple

import numpy as np

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import Family
from ultrathink_jax.interop.huggingface import find_exact
from ultrathink_jax.lora.named import NamedAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ALPHA_DIGITS = 12  # so that an alpha that was multiplied by a rank and divided again is itself


class PeftAdapter(NamedTuple):
  """An adapter directory.

  Attributes:
    adapters: by our unstacked name of the kernel.
    trained: parameters trained in full, by our unstacked names, in our layout.
    is_rslora: scales are alpha / sqrt(r).
    base: directory or name of the base model.
    dropout: of the adapters' inputs in training.
  """

  adapters: dict[str, NamedAdapter]
  trained: dict[str, np.ndarray]
  is_rslora: bool
  base: str
  dropout: float


def scale_of(alpha: float, rank: int, is_rslora: bool) -> float:
  return alpha / (math.sqrt(rank) if is_rslora else rank)


def alpha_of(scale: float, rank: int, is_rslora: bool) -> float:
  """Returns the alpha that gives `scale` at `rank`."""
  return float(f"{scale * (math.sqrt(rank) if is_rslora else rank):.{_ALPHA_DIGITS}g}")


def require_held(model: ModelConfig, family: Family) -> None:
  """Raises ConfigError where the architecture holds another model, or this one with layers added."""
  if find_exact(model, family)[1].model != model:
    raise ConfigError(
      f"{family.architecture} holds this model with layers of zeros added, and an adapter's layers would be numbered "
      "otherwise; merge the adapter and export the whole model"
    )
