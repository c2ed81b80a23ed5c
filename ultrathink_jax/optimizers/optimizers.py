"""Optimizers by name, each a gradient transformation from Optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ultrathink_jax.config import OptimizerConfig
from ultrathink_jax.errors import ConfigError


def decay_mask(params: Any) -> Any:
  """Returns True for weight matrices (leaves named "kernel" outside convolutions), False for every other leaf."""

  def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
    names = [key.key for key in path]
    return names[-1] == "kernel" and not names[-2].startswith("conv_")

  return jax.tree_util.tree_map_with_path(is_decayed, params)


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=decay_mask
  )


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]] = {"adamw": _adamw}


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Returns the named optimizer behind clipping by the global gradient norm.

  Raises:
    ConfigError: the name is unknown.
  """
  if config.name not in OPTIMIZERS:
    raise ConfigError(f"optimizer.name={config.name!r} is not one of {', '.join(OPTIMIZERS)}")
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](config, schedule))
