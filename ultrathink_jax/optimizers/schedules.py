"""Learning-rate schedules by name; the optimizer step is their only clock."""

from collections.abc import Callable

import optax

from ultrathink_jax.config import OptimizerConfig
from ultrathink_jax.errors import ConfigError


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
  return optax.cosine_decay_schedule(config.learning_rate, max(1, steps), alpha=config.final_learning_rate_ratio)


def _constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
  return optax.constant_schedule(config.learning_rate)


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {"cosine": _cosine, "constant": _constant}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns step -> learning rate: a linear warm-up from 0, then the named schedule to the last of `steps` steps.

  Step 0 already moves: the warm-up reaches the peak with its last step.

  Raises:
    ConfigError: the name is unknown or the warm-up is longer than the run.
  """
  if config.schedule not in SCHEDULES:
    raise ConfigError(f"optimizer.schedule={config.schedule!r} is not one of {', '.join(SCHEDULES)}")
  if config.warmup_steps >= steps:
    raise ConfigError(
      f"optimizer.warmup_steps={config.warmup_steps} leaves nothing of train.steps={steps}; choose at most {steps - 1}"
    )
  after = SCHEDULES[config.schedule](config, steps - config.warmup_steps)
  if not config.warmup_steps:
    return after
  first = config.learning_rate / config.warmup_steps
  warmup = optax.linear_schedule(first, config.learning_rate + first, config.warmup_steps)
  return optax.join_schedules([warmup, after], [config.warmup_steps])
