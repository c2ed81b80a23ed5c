"""Optimizers by name: a direction from Optax or from a paper, weight decay, and the learning rate of the step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import schedule_free

from ultrathink_jax.config import OptimizerConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.models.matrices import path_name
from ultrathink_jax.optimizers.averaging import with_average
from ultrathink_jax.optimizers.galore import scale_by_galore
from ultrathink_jax.optimizers.groups import decay_mask, is_router_bias, rate_factors
from ultrathink_jax.optimizers.muon import scale_by_muon_and_adam
from ultrathink_jax.optimizers.sophia import scale_by_sophia

Optimizer = optax.GradientTransformation


def _rule(config: OptimizerConfig, direction: Optimizer, schedule: optax.Schedule) -> Optimizer:
  """Returns -learning rate * (direction + weight_decay * parameter)."""
  decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
  return optax.chain(direction, decay, _scale_by_rate(config, schedule))


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=_moment_dtype(config))
  return _rule(config, adam, schedule)


def _lion(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  """Source: arXiv:2302.06675 algorithm 2."""
  return _rule(config, optax.scale_by_lion(config.beta1, config.beta2, _moment_dtype(config)), schedule)


def _sophia(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  rho, every_steps = config.sophia.rho, config.sophia.every_steps
  sophia = scale_by_sophia(config.beta1, config.beta2, rho, every_steps, _moment_dtype(config))
  return _rule(config, sophia, schedule)


def _galore(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  low = config.galore
  betas, dtype = (config.beta1, config.beta2), _moment_dtype(config)
  galore = scale_by_galore(*betas, config.epsilon, low.rank, low.every_steps, low.scale, dtype)
  return _rule(config, galore, schedule)


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  muon = scale_by_muon_and_adam(config.beta1, config.beta2, config.epsilon, _moment_dtype(config))
  return _rule(config, muon, schedule)


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  """Adafactor with steps of the learning rate's size rather than of the parameters', and decay as AdamW's.

  Second moments follow 1 - step^-0.8, not beta2, and are factored where the two longest dims of a leaf have 128 or
  more. A leaf's update is scaled down to a root mean square of 1. optax.adafactor decays at the full rate in each step.

  Source: arXiv:1804.04235 algorithm 4; arXiv:2106.04560 section 3.4 (momentum, no scale of parameters).
  """
  links = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
  if config.beta1:
    links.append(optax.ema(config.beta1, debias=False, accumulator_dtype=_moment_dtype(config)))
  return _rule(config, optax.chain(*links), schedule)


def _sgd(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  momentum = optax.trace(config.beta1, accumulator_dtype=_moment_dtype(config)) if config.beta1 else optax.identity()
  return _rule(config, momentum, schedule)


def _schedule_free(config: OptimizerConfig, schedule: optax.Schedule) -> Optimizer:
  """AdamW whose average of iterates takes the place of momentum and of a falling rate.

  Optax asks the schedule, for the weight of a step in the average, one step ahead of the update itself.

  Source: arXiv:2405.15682 algorithm 1.
  """
  if config.schedule != "constant":
    raise ConfigError(
      f"optimizer.schedule={config.schedule!r} with optimizer.name='schedule_free', which averages instead of lowering "
      "the rate; set --config.optimizer.schedule=constant"
    )
  if not config.beta1:
    raise ConfigError("optimizer.beta1=0.0 with optimizer.name='schedule_free' averages nothing; choose 0.9")
  if config.average_decay:
    raise ConfigError(
      f"optimizer.average_decay={config.average_decay} with optimizer.name='schedule_free', which has its own average; "
      "set --config.optimizer.average_decay=0"
    )
  rms = optax.scale_by_rms(config.beta2, config.epsilon, eps_in_sqrt=False, bias_correction=True)
  return schedule_free(_rule(config, rms, schedule), lambda count: schedule(count - 1), config.beta1)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, optax.Schedule], Optimizer]] = {
  "adamw": _adamw,
  "lion": _lion,
  "sophia": _sophia,
  "galore": _galore,
  "adafactor": _adafactor,
  "muon": _muon,
  "sgd": _sgd,
  "schedule_free": _schedule_free,
}
_WITHOUT_MOMENT = ("schedule_free",)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
  """Returns the named optimizer behind clipping by the global gradient norm; routers' biases have their own rule.

  `update` takes `step`, the optimizer step, of which the schedule gives the rate; without it the rate is by the number
  of updates. It takes the gradients' `norm`, where that is known, and Sophia's takes `curvature` too. `init` raises
  ConfigError as `rate_factors` does.

  Raises:
    ConfigError: the name is unknown, or what else is set does not go with it.
  """
  if config.name not in OPTIMIZERS:
    raise ConfigError(f"optimizer.name={config.name!r} is not one of {', '.join(OPTIMIZERS)}")
  if config.moment_dtype != "float32" and config.name in _WITHOUT_MOMENT:
    others = ", ".join(name for name in OPTIMIZERS if name not in _WITHOUT_MOMENT)
    raise ConfigError(
      f"optimizer.moment_dtype={config.moment_dtype!r} with optimizer.name={config.name!r}, which has no first moment; "
      f"set it to 'float32', or choose one of {others}"
    )
  rule = OPTIMIZERS[config.name](config, schedule)
  optimizer = _with_router_bias(optax.chain(_clip_by_global_norm(config.clip_norm), rule), config.router_bias_rate)
  return with_average(optimizer, config.average_decay) if config.average_decay else optimizer


def needs_curvature(config: OptimizerConfig) -> bool:
  """Returns whether `update` is to be given `curvature`."""
  return config.name == "sophia"


def _moment_dtype(config: OptimizerConfig) -> Any:
  """Returns the dtype of first moments, None for that of the parameters."""
  return None if config.moment_dtype == "float32" else jnp.dtype(config.moment_dtype)


def _scale_by_rate(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
  """Returns what multiplies by -schedule(step), and by the factors of `rate_multipliers`.

  The state is that of optax.scale_by_learning_rate.
  """

  def init(params: Any) -> optax.ScaleByScheduleState:
    rate_factors(config, params)
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(
    updates: Any, state: optax.ScaleByScheduleState, params: Any = None, *, step: Any = None, **_: Any
  ) -> tuple[Any, optax.ScaleByScheduleState]:
    rate = -schedule(state.count if step is None else step)
    factors = rate_factors(config, updates)

    def scale(path: tuple, update: jax.Array) -> jax.Array:
      factor = factors.get(path_name(path), 1.0)
      return jnp.array(rate if factor == 1 else rate * factor, update.dtype) * update

    return jax.tree_util.tree_map_with_path(scale, updates), optax.ScaleByScheduleState(
      optax.safe_increment(state.count)
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """Returns optax.clip_by_global_norm as one factor for all leaves; `update` takes the `norm` where it is known.

  Optax divides every leaf by the norm and then selects, an array that a CPU writes and reads three times.
  """

  def update(gradients: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> tuple[Any, Any]:
    norm = optax.tree.norm(gradients) if norm is None else norm
    factor = jnp.minimum(1.0, max_norm / norm)  # 1 where the norm is 0
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _with_router_bias(optimizer: Optimizer, rate: float) -> optax.GradientTransformationExtraArgs:
  """Returns `optimizer` for all leaves but those named "router_bias", which move by -rate * sign(gradient).

  Those have a gradient of 0 for `optimizer`. The state is that of `optimizer`, whether there are such leaves or not:
  optax.partition would nest it, and checkpoints with it.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    stilled = lambda path, g: jnp.zeros_like(g) if is_router_bias(path) else g
    others = jax.tree_util.tree_map_with_path(stilled, gradients)
    updates, state = optimizer.update(others, state, params, **extra)
    move = lambda path, g, u: -rate * jnp.sign(g) if is_router_bias(path) else u
    return jax.tree_util.tree_map_with_path(move, gradients, updates), state

  return optax.GradientTransformationExtraArgs(optimizer.init, update)
