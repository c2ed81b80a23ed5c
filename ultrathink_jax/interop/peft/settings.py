"""adapter_config.json: what of it we compute, and what is refused by name."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.interop.peft.adapter import CONFIG_FILE

PEFT_VERSION = "0.21.2"  # whose layout we write
_FIRST_VERSION_OF_BANKS = (0, 19)  # before it, banks had in and out the other way round
_READ = (
  *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "peft_version"),
  *("base_model_name_or_path", "target_parameters", "modules_to_save", "peft_type", "task_type"),
  *("bias", "init_lora_weights"),
)
# They say how an adapter was begun, trained or placed; what it computes is in its tensors.
_WITHOUT_EFFECT = (
  *("auto_mapping", "revision", "inference_mode", "runtime_config", "megatron_core", "qalora_group_size"),
  *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
  "ensure_weight_tying",
  *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
_KEEPS_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # of initialisations by name


class Settings(NamedTuple):
  """The keys of adapter_config.json that matter to what an adapter computes."""

  rank: int
  alpha: float
  rank_pattern: dict[str, int]
  alpha_pattern: dict[str, float]
  is_rslora: bool
  is_dora: bool
  dropout: float
  base: str
  target_parameters: tuple[str, ...]
  peft_version: str

  def rank_of(self, target: str) -> int:
    return _look_up(self.rank_pattern, target, self.rank)

  def alpha_of(self, target: str) -> float:
    return _look_up(self.alpha_pattern, target, self.alpha)

  def is_parameter(self, name: str) -> bool:
    """Returns whether the parameter is wrapped rather than its module."""
    return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

  def require_banks(self) -> None:
    """Raises ConfigError where the file is, or may be, of a version that packed banks otherwise."""
    numbers = re.match(r"(\d+)\.(\d+)", self.peft_version)
    if numbers is None or tuple(map(int, numbers.groups())) < _FIRST_VERSION_OF_BANKS:
      raise ConfigError(
        f"{CONFIG_FILE}: peft_version={self.peft_version!r}, and before 0.19 adapters of fused experts had their "
        "dims the other way round; train or convert it with peft 0.19 or later"
      )


def _look_up(pattern: dict[str, Any], target: str, default: Any) -> Any:
  for key, value in pattern.items():
    if re.match(rf"(.*\.)?({key})$", target):
      return value
  return default


def read_settings(directory: Path) -> Settings:
  """Returns the settings of an adapter directory.

  Raises:
    CheckpointError: there is no such file.
    ConfigError: it asks for what we do not compute.
  """
  path = directory / CONFIG_FILE
  try:
    values = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise CheckpointError(f"{path} cannot be read: {error}") from error
  _require(path, "peft_type", values.get("peft_type"), ("LORA",))
  _require(path, "task_type", values.get("task_type"), (None, "CAUSAL_LM"))
  _require(path, "bias", values.get("bias", "none"), ("none",))
  init = values.get("init_lora_weights", True)
  if isinstance(init, str) and init not in _KEEPS_THE_BASE:
    raise ConfigError(
      f"{path}: init_lora_weights={init!r} changed the base weights, so the adapter does not fit the base model; "
      "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
    )
  for key, value in values.items():
    if value and key not in (*_READ, *_WITHOUT_EFFECT):
      raise ConfigError(f"{path}: {key}={value!r} is not computed here; only plain LoRA, rsLoRA and DoRA are")
  return Settings(
    rank=values.get("r", 8),
    alpha=float(values.get("lora_alpha", 8)),
    rank_pattern=values.get("rank_pattern") or {},
    alpha_pattern={key: float(value) for key, value in (values.get("alpha_pattern") or {}).items()},
    is_rslora=bool(values.get("use_rslora")),
    is_dora=bool(values.get("use_dora")),
    dropout=float(values.get("lora_dropout") or 0),
    base=values.get("base_model_name_or_path") or "",
    target_parameters=tuple(values.get("target_parameters") or ()),
    peft_version=values.get("peft_version") or "",
  )


def _require(path: Path, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
  if value not in allowed:
    raise ConfigError(f"{path}: {key}={value!r} is not {' or '.join(map(str, allowed))}; only such adapters are read")


def shorten(targets: Iterable[str], everything: Iterable[str]) -> list[str]:
  """Returns names that PEFT matches with `targets` of `everything`: last parts of paths where these say it all."""
  others = set(everything) - set(targets)
  is_enough = lambda leaf: not any(other.endswith(leaf) for other in others)
  return sorted({_leaf(target) if is_enough(_leaf(target)) else target for target in targets})


def patterns(values: dict[str, float | int], default: float | int) -> dict[str, float | int]:
  """Returns rank_pattern or alpha_pattern of {target: value}: a last part where all its targets agree."""
  by_leaf: dict[str, set[float | int]] = {}
  for target, value in values.items():
    by_leaf.setdefault(_leaf(target), set()).add(value)
  name_of = lambda target: _leaf(target) if len(by_leaf[_leaf(target)]) == 1 else target
  return {name_of(target): value for target, value in values.items() if value != default}


def _leaf(target: str) -> str:
  """Returns q_proj of model.layers.0.self_attn.q_proj, and gate.weight of model.layers.0.mlp.gate.weight."""
  return ".".join(target.split(".")[-2 if target.endswith(".weight") else -1 :])
