"""The sections `log` and `advice`: where a run reports to, and when it says that something looks wrong."""

import dataclasses

from ultrathink_jax.config.checks import require_at_least, require_fraction
from ultrathink_jax.errors import ConfigError

SINKS = ("mlflow", "wandb")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Where a run reports to, beside its workdir."""

  sinks: tuple[str, ...]
  project: str
  run_name: str

  def __post_init__(self) -> None:
    for sink in self.sinks:
      if sink not in SINKS:
        raise ConfigError(f"log.sinks={self.sinks!r} has {sink!r}, which is not one of {', '.join(SINKS)}")


@dataclasses.dataclass(frozen=True)
class AdviceConfig:
  """What is worth a line on the console; 0 turns a rule off."""

  explosion_ratio: float
  oscillation_ratio: float
  flat_steps: int
  flat_ratio: float
  collapse_share: float
  saturation_entropy: float

  def __post_init__(self) -> None:
    require_at_least("advice", self, 0, "explosion_ratio", "oscillation_ratio", "flat_steps", "flat_ratio")
    require_fraction("advice", self, "collapse_share", "saturation_entropy")
