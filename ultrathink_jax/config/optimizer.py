"""The section `optimizer`: the update rule, its schedule, and what guards it."""

import dataclasses

from ultrathink_jax.config.checks import require_at_least, require_choice, require_fraction, require_positive
from ultrathink_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SophiaConfig:
  """What Sophia-G needs beside betas: how far a step goes, and how often curvature is estimated."""

  rho: float
  every_steps: int

  def __post_init__(self) -> None:
    require_at_least("optimizer.sophia", self, 1, "every_steps")
    if not self.rho > 0:
      raise ConfigError(f"optimizer.sophia.rho={self.rho} is not positive; choose a value above 0, as 0.04")


@dataclasses.dataclass(frozen=True)
class GaloreConfig:
  """The low-rank projection in which GaLore keeps its moments."""

  rank: int
  every_steps: int
  scale: float

  def __post_init__(self) -> None:
    require_at_least("optimizer.galore", self, 1, "rank", "every_steps")
    require_at_least("optimizer.galore", self, 0, "scale")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """Which steps are not applied, and when a run goes back."""

  spike_sigmas: float
  window_steps: int
  max_skipped: int
  max_rollbacks: int

  def __post_init__(self) -> None:
    require_at_least("optimizer.guard", self, 0, "spike_sigmas", "max_rollbacks")
    require_at_least("optimizer.guard", self, 1, "max_skipped")
    require_at_least("optimizer.guard", self, 8, "window_steps")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The update rule and its learning-rate schedule."""

  name: str
  learning_rate: float
  rate_multipliers: tuple[str, ...]
  schedule: str
  warmup_steps: int
  warmup_ratio: float
  final_learning_rate_ratio: float
  decay_power: float
  decay_ratio: float
  restarts: int
  beta1: float
  beta2: float
  epsilon: float
  weight_decay: float
  moment_dtype: str
  clip_norm: float
  average_decay: float
  offload: bool
  router_bias_rate: float
  sophia: SophiaConfig
  galore: GaloreConfig
  guard: GuardConfig

  def __post_init__(self) -> None:
    require_fraction("optimizer", self, "beta1", "beta2", "average_decay", "warmup_ratio")
    require_at_least(
      "optimizer",
      self,
      0,
      "learning_rate",
      "warmup_steps",
      "weight_decay",
      "final_learning_rate_ratio",
      "router_bias_rate",
    )
    require_at_least("optimizer", self, 1, "restarts")
    require_choice("optimizer", self, moment_dtype=("float32", "bfloat16"))
    require_positive("optimizer", self, "epsilon", "clip_norm", "decay_power")
    if not 0 < self.decay_ratio <= 1:
      raise ConfigError(
        f"optimizer.decay_ratio={self.decay_ratio} is outside (0, 1]; choose the share of steps, as 0.2"
      )
