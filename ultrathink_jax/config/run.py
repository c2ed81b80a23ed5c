"""The sections of a run beside its model and its data."""

import dataclasses

from ultrathink_jax.config.checks import divisors, require_at_least, require_choice, require_fraction
from ultrathink_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis, outermost first; -1 stands for all devices that are left."""

  slices: int
  data: int
  fsdp: int
  expert: int
  context: int
  tensor: int
  pipe: int
  zero: int

  def __post_init__(self) -> None:
    require_at_least("mesh", self, 1, "slices")
    for axis, size in self.axes.items():
      if size < 1 and size != -1:
        raise ConfigError(
          f"mesh.{axis}={size} is not a number of devices; choose 1 or more, or -1 for all that are left"
        )
    unknown = [axis for axis, size in self.axes.items() if size == -1]
    if len(unknown) > 1:
      raise ConfigError(f"mesh axes {', '.join(unknown)} are all -1; at most one axis can take the devices left")
    if self.zero not in (1, 2, 3):
      raise ConfigError(f"mesh.zero={self.zero} is not a level of ZeRO; choose 1, 2 or 3")

  @property
  def axes(self) -> dict[str, int]:
    """Devices along each axis of one slice, outermost first."""
    return {axis: getattr(self, axis) for axis in ("data", "fsdp", "expert", "context", "tensor", "pipe")}


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What each auxiliary loss counts beside the language-modelling loss."""

  load_balance_weight: float
  load_balance_form: str
  router_z_weight: float
  router_importance_weight: float
  router_entropy_weight: float
  z_weight: float
  scan_weight: float
  label_smoothing: float
  prompt_weight: float

  def __post_init__(self) -> None:
    require_at_least("loss", self, 0, *(field.name for field in dataclasses.fields(self) if field.type is float))
    require_choice("loss", self, load_balance_form=("layers", "pooled"))
    require_fraction("loss", self, "label_smoothing")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The length and the batch of a run."""

  steps: int
  tokens: int
  epochs: float
  batch_size: int
  sequence_length: int
  accumulation_steps: int
  seed: int
  trainable: tuple[str, ...]
  deterministic: bool
  log_every_steps: int
  hang_seconds: float

  def __post_init__(self) -> None:
    require_at_least("train", self, 1, "steps", "batch_size", "sequence_length", "log_every_steps")
    require_at_least("train", self, 0, "seed", "tokens", "epochs", "accumulation_steps", "hang_seconds")
    if self.tokens and self.epochs:
      raise ConfigError(
        f"train.tokens={self.tokens} and train.epochs={self.epochs} both say how long the run is; set one of them to 0"
      )
    if self.accumulation_steps and self.batch_size % self.accumulation_steps:
      raise ConfigError(
        f"train.batch_size={self.batch_size} is not a multiple of train.accumulation_steps={self.accumulation_steps}; "
        f"choose accumulation_steps in {divisors(self.batch_size)}"
      )

  @property
  def micro_batch_size(self) -> int:
    """Sequences, over all devices, that one backward pass sees; all of them as long as their number is open."""
    return self.batch_size // max(1, self.accumulation_steps)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """When and on how much of the validation split a run is evaluated."""

  every_steps: int
  num_batches: int
  averaged: bool
  best_metric: str
  best_is: str
  patience: int
  min_delta: float
  documents: int
  samples: int
  general: str
  tasks: tuple[str, ...]
  tasks_folder: str

  def __post_init__(self) -> None:
    require_at_least("evaluate", self, 0, "every_steps", "patience", "min_delta", "documents", "samples")
    require_choice("evaluate", self, best_is=("lowest", "highest"))
    if self.patience and not self.every_steps:
      raise ConfigError(
        f"evaluate.patience={self.patience} counts evaluations, and evaluate.every_steps=0 makes none; set every_steps"
      )
    require_at_least("evaluate", self, 1, "num_batches")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are written and how many stay."""

  every_steps: int
  keep_last: int
  keep_best: int
  keep_every_steps: int
  init_from: str
  stop_seconds: float

  def __post_init__(self) -> None:
    require_at_least("checkpoint", self, 1, "every_steps", "keep_last", "stop_seconds")
    require_at_least("checkpoint", self, 0, "keep_best", "keep_every_steps")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """How the next token is chosen and when a completion ends."""

  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float
  repetition_penalty: float
  stop: tuple[str, ...]
  seed: int

  def __post_init__(self) -> None:
    require_at_least("generate", self, 1, "max_new_tokens")
    require_at_least("generate", self, 0, "temperature", "top_k", "seed")
    if not 0 < self.top_p <= 1:
      raise ConfigError(f"generate.top_p={self.top_p} is outside (0, 1]; choose 1 to keep every token")
    if not self.repetition_penalty > 0:
      raise ConfigError(f"generate.repetition_penalty={self.repetition_penalty} is not positive; choose 1 for none")
