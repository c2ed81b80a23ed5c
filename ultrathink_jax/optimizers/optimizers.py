"""Optimizers by name, each a gradient transformation from Optax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
  """Returns the named optimizer behind clipping by the global gradient norm; routers' biases have their own rule.

  Raises:
    ConfigError: the name is unknown.
  """
  if config.name not in OPTIMIZERS:
    raise ConfigError(f"optimizer.name={config.name!r} is not one of {', '.join(OPTIMIZERS)}")
  optimizer = optax.chain(_clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](config, schedule))
  return _with_router_bias(optimizer, config.router_bias_rate)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Returns optax.clip_by_global_norm as one factor for all leaves.

  Optax divides every leaf by the norm and then selects, an array that a CPU writes and reads three times.
  """

  def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    factor = jnp.minimum(1.0, max_norm / optax.tree.norm(gradients))  # 1 where the norm is 0
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _with_router_bias(optimizer: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
  """Returns `optimizer` for all leaves but those named "router_bias", which move by -rate * sign(gradient).

  Those have a gradient of 0 for `optimizer`. The state is that of `optimizer`, whether there are such leaves or not:
  optax.partition would nest it, and checkpoints with it.
  """
  is_bias = lambda path: path[-1].key == "router_bias"

  def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    others = jax.tree_util.tree_map_with_path(lambda path, g: jnp.zeros_like(g) if is_bias(path) else g, gradients)
    updates, state = optimizer.update(others, state, params)
    move = lambda path, g, u: -rate * jnp.sign(g) if is_bias(path) else u
    return jax.tree_util.tree_map_with_path(move, gradients, updates), state

  return optax.GradientTransformation(optimizer.init, update)
