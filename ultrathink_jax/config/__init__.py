"""The configuration of a run as frozen dataclasses, checked where they are made. Keys and units: configs/base.py."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from ultrathink_jax.config.code import CodeConfig
from ultrathink_jax.config.data import DataConfig
from ultrathink_jax.config.lora import LoraConfig
from ultrathink_jax.config.model import ModelConfig, RopeConfig
from ultrathink_jax.config.optimizer import GaloreConfig, GuardConfig, OptimizerConfig, SophiaConfig
from ultrathink_jax.config.quality import QualityConfig
from ultrathink_jax.config.run import (
  CheckpointConfig,
  EvaluateConfig,
  GenerateConfig,
  LossConfig,
  MeshConfig,
  TrainConfig,
)
from ultrathink_jax.config.watching import AdviceConfig, LogConfig
from ultrathink_jax.errors import ConfigError

__all__ = [
  "AdviceConfig",
  "CheckpointConfig",
  "CodeConfig",
  "Config",
  "DataConfig",
  "EvaluateConfig",
  "GaloreConfig",
  "GenerateConfig",
  "GuardConfig",
  "LogConfig",
  "LoraConfig",
  "LossConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "QualityConfig",
  "RopeConfig",
  "SophiaConfig",
  "TrainConfig",
  "from_mapping",
]


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  recipe: str
  model: ModelConfig
  data: DataConfig
  quality: QualityConfig
  code: CodeConfig
  mesh: MeshConfig
  optimizer: OptimizerConfig
  lora: LoraConfig
  loss: LossConfig
  train: TrainConfig
  evaluate: EvaluateConfig
  checkpoint: CheckpointConfig
  log: LogConfig
  advice: AdviceConfig
  generate: GenerateConfig

  def __post_init__(self) -> None:
    if self.model.gather_ahead and self.mesh.pipe != 1:
      raise ConfigError(
        f"model.gather_ahead=True with mesh.pipe={self.mesh.pipe}: a pipeline stage keeps its own order of work; "
        "set model.gather_ahead=False or mesh.pipe=1"
      )
    if self.model.gather_ahead and self.model.remat == "none":
      raise ConfigError(
        "model.gather_ahead=True with model.remat='none' would keep gathered weights for the backward pass; "
        "choose another model.remat"
      )
    if self.model.gather_ahead and self.is_adapted:
      raise ConfigError(
        "model.gather_ahead=True gathers float weights alone, and lora.rank or train.trainable is set; "
        "set model.gather_ahead=False"
      )
    if self.loss.load_balance_form == "pooled" and self.model.router == "grouped":
      raise ConfigError("loss.load_balance_form='pooled' has no meaning for model.router='grouped'; choose 'layers'")
    if self.lora.dropout and self.mesh.pipe != 1:
      raise ConfigError(
        f"lora.dropout={self.lora.dropout} with mesh.pipe={self.mesh.pipe}: stages draw no such numbers; set it to 0.0"
      )
    if self.lora.base_dtype != "float32" and not self.is_adapted:
      raise ConfigError(
        f"lora.base_dtype={self.lora.base_dtype!r} is of frozen weights, and this run freezes none; set lora.rank or "
        "train.trainable"
      )
    if self.evaluate.patience and not self.checkpoint.keep_best:
      raise ConfigError(
        f"evaluate.patience={self.evaluate.patience} ends training with the best parameters; checkpoint.keep_best=0 "
        "keeps none of them: set it to 1"
      )

  @property
  def is_adapted(self) -> bool:
    """Whether a part of the weights is frozen, or adapters are beside them."""
    return self.lora.rank > 0 or bool(self.train.trainable)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


class FrozenMapping(dict):
  """A mapping that can be hashed, as the dataclasses that hold it can."""

  def __hash__(self) -> int:
    return hash(frozenset(self.items()))


def from_mapping(values: Mapping[str, Any], section: type = Config, path: str = "") -> Any:
  """Returns `values`, a nested mapping with exactly the keys of configs/base.py, as a checked `section` dataclass.

  Raises:
    ConfigError: a key is unknown (the nearest valid one is named) or missing, or a value has the wrong type.
  """
  fields = {field.name: field.type for field in dataclasses.fields(section)}
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      hint = f"did you mean {path}{near[0]}?" if near else f"valid keys: {', '.join(fields)}"
      raise ConfigError(f"{path}{key} is not a configuration key; {hint}")
  missing = [key for key in fields if key not in values]
  if missing:
    raise ConfigError(f"the configuration lacks {', '.join(path + key for key in missing)}; see configs/base.py")
  return section(**{key: _convert(values[key], kind, path + key) for key, kind in fields.items()})


def _convert(value: Any, kind: Any, path: str) -> Any:
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, Mapping):
      raise ConfigError(f"{path}={value!r} is not a section of keys")
    return from_mapping(value, kind, path + ".")
  if get_origin(kind) is Mapping:
    if isinstance(value, Mapping):
      item = get_args(kind)[1]
      return FrozenMapping({key: _convert(of_key, item, f"{path}.{key}") for key, of_key in value.items()})
  elif get_origin(kind) is tuple:
    item = get_args(kind)[0]
    if isinstance(value, (list, tuple)) and all(isinstance(v, item) for v in value):
      return tuple(value)
  elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
    return value
  raise ConfigError(f"{path}={value!r} has type {type(value).__name__}; it takes {getattr(kind, '__name__', kind)}")
