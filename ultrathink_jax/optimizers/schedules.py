"""Learning-rate schedules by name, and how long a run is; the optimizer step is the only clock."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax

from ultrathink_jax.config import OptimizerConfig, TrainConfig
from ultrathink_jax.errors import ConfigError


def _floor(config: OptimizerConfig) -> float:
  return config.learning_rate * config.final_learning_rate_ratio


def _constant(config: OptimizerConfig, steps: int, run_steps: int) -> optax.Schedule:
  return optax.constant_schedule(config.learning_rate)


def _linear(config: OptimizerConfig, steps: int, run_steps: int) -> optax.Schedule:
  return optax.linear_schedule(config.learning_rate, _floor(config), steps)


def _cosine(config: OptimizerConfig, steps: int, run_steps: int) -> optax.Schedule:
  return optax.cosine_decay_schedule(config.learning_rate, steps, alpha=config.final_learning_rate_ratio)


def _polynomial(config: OptimizerConfig, steps: int, run_steps: int) -> optax.Schedule:
  return optax.polynomial_schedule(config.learning_rate, _floor(config), config.decay_power, steps)


def _exponential(config: OptimizerConfig, steps: int, run_steps: int) -> optax.Schedule:
  if not config.final_learning_rate_ratio:
    raise ConfigError(
      "optimizer.final_learning_rate_ratio=0.0 is what optimizer.schedule='exponential' never comes to; "
      "choose a value above 0, as 0.1"
    )
  ratio = config.final_learning_rate_ratio
  return optax.exponential_decay(config.learning_rate, steps, ratio, end_value=_floor(config))


def _cosine_restarts(config: OptimizerConfig, steps: int, run_steps: int) -> optax.Schedule:
  def rate(step):
    share = jnp.where(step < steps, step * config.restarts % steps / steps, 1.0)
    cosine = (1 + jnp.cos(jnp.pi * share)) / 2
    return _floor(config) + (config.learning_rate - _floor(config)) * cosine

  return rate


def _wsd(config: OptimizerConfig, steps: int, run_steps: int) -> optax.Schedule:
  """Source: arXiv:2404.06395 section 4.2."""
  falling = min(steps, max(1, round(config.decay_ratio * run_steps)))
  return optax.linear_schedule(config.learning_rate, _floor(config), falling, steps - falling)


# Name -> (config, steps after the warm-up, steps of the run) -> rate of each step after the warm-up.
SCHEDULES: dict[str, Callable[[OptimizerConfig, int, int], optax.Schedule]] = {
  "cosine": _cosine,
  "constant": _constant,
  "linear": _linear,
  "polynomial": _polynomial,
  "exponential": _exponential,
  "cosine_restarts": _cosine_restarts,
  "wsd": _wsd,
}


def num_warmup_steps(config: OptimizerConfig, steps: int) -> int:
  """Returns the length of the warm-up of a run of `steps` steps, however it is given."""
  return round(config.warmup_ratio * steps) if config.warmup_ratio else config.warmup_steps


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns step -> learning rate: a linear warm-up from 0, then the named schedule to the last of `steps` steps.

  Step 0 already moves: the warm-up reaches the peak with its last step.

  Raises:
    ConfigError: the name is unknown or the warm-up is longer than the run.
  """
  if config.schedule not in SCHEDULES:
    raise ConfigError(f"optimizer.schedule={config.schedule!r} is not one of {', '.join(SCHEDULES)}")
  warmup_steps = num_warmup_steps(config, steps)
  if warmup_steps >= steps:
    key = "warmup_ratio" if config.warmup_ratio else "warmup_steps"
    most = round((steps - 1) / steps, 3) if config.warmup_ratio else steps - 1
    raise ConfigError(
      f"optimizer.{key}={getattr(config, key)} leaves nothing of train.steps={steps}; choose at most {most}"
    )
  after = SCHEDULES[config.schedule](config, steps - warmup_steps, steps)
  if not warmup_steps:
    return after
  first = config.learning_rate / warmup_steps
  warmup = optax.linear_schedule(first, config.learning_rate + first, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def resolve_steps(train: TrainConfig, rows_per_epoch: int | None) -> int:
  """Returns the optimizer steps of a run: train.steps, or the fewest that read train.tokens or train.epochs.

  Raises:
    ConfigError: the length is in epochs, and that of one is not known (None).
  """
  if train.tokens:
    return -(-train.tokens // _tokens_per_step(train))
  if not train.epochs:
    return train.steps
  if rows_per_epoch is None:
    raise ConfigError(
      f"train.epochs={train.epochs:g} of data whose length is not known; set --config.train.epochs=0 and "
      "--config.train.steps or --config.train.tokens"
    )
  return max(1, math.ceil(round(train.epochs * rows_per_epoch, 6) / train.batch_size))


def format_length(train: TrainConfig, steps: int, rows_per_epoch: int | None) -> str:
  """Returns a line on the length of a run of `steps` steps, in steps, tokens and, where they are known, epochs."""
  tokens = steps * _tokens_per_step(train)
  line = f"{steps:,} steps of {train.batch_size} x {train.sequence_length} tokens = {tokens:,} tokens"
  if rows_per_epoch:
    line += f" = {steps * train.batch_size / rows_per_epoch:.2f} epochs"
  asked = f"train.tokens={train.tokens:,}" if train.tokens else f"train.epochs={train.epochs:g}" if train.epochs else ""
  return f"{line} (for {asked})" if asked else line


def _tokens_per_step(train: TrainConfig) -> int:
  return train.batch_size * train.sequence_length
