"""The configuration of a run as frozen dataclasses, checked where they are made. Keys and units: configs/base.py."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from ultrathink_jax.errors import ConfigError


def _require_choice(section: str, config: Any, **choices: tuple[str, ...]) -> None:
  for key, allowed in choices.items():
    value = getattr(config, key)
    if value not in allowed:
      near = difflib.get_close_matches(str(value), allowed, 1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"{section}.{key}={value!r} is not one of {', '.join(allowed)}{hint}")


def _require_at_least(section: str, config: Any, minimum: int | float, *keys: str) -> None:
  for key in keys:
    if not getattr(config, key) >= minimum:
      raise ConfigError(f"{section}.{key}={getattr(config, key)} is below {minimum}; choose {minimum} or more")


def _require_fraction(section: str, config: Any, *keys: str) -> None:
  for key in keys:
    if not 0 <= getattr(config, key) < 1:
      raise ConfigError(f"{section}.{key}={getattr(config, key)} is outside [0, 1); choose a value from 0 to below 1")


def _divisors(number: int) -> str:
  return ", ".join(str(k) for k in range(1, number + 1) if number % k == 0)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """How rotary angles follow from positions."""

  theta: float
  fraction: float
  scaling: str
  factor: float
  original_tokens: int
  low_frequency_factor: float
  high_frequency_factor: float
  beta_fast: float
  beta_slow: float
  attention_factor: float

  def __post_init__(self) -> None:
    _require_choice("model.rope", self, scaling=("none", "linear", "dynamic", "yarn", "llama3"))
    _require_at_least("model.rope", self, 1, "factor", "original_tokens")
    _require_at_least("model.rope", self, 0, "attention_factor")
    for key in ("theta", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow"):
      if not getattr(self, key) > 0:
        raise ConfigError(f"model.rope.{key}={getattr(self, key)} is not positive; choose a value above 0")
    if not 0 < self.fraction <= 1:
      raise ConfigError(f"model.rope.fraction={self.fraction} is outside (0, 1]; choose 1 to turn every dim of a head")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture."""

  layers: str
  vocab_size: int
  embed_dim: int
  tie_embeddings: bool
  dtype: str
  remat: str
  gather_ahead: bool
  pipe_micro_batches: int
  unroll: int
  norm_epsilon: float
  embedding_multiplier: float
  residual_multiplier: float
  logits_multiplier: float
  logits_soft_cap: float
  num_heads: int
  num_kv_heads: int
  head_dim: int
  qk_norm: str
  qkv_clip: float
  attention_bias: str
  attention_scale: float
  attention_soft_cap: float
  attention_sinks: bool
  attention_backend: str
  position: str
  rope: RopeConfig
  window_tokens: int
  mlp_dim: int
  mlp_activation: str
  mlp_bias: bool
  num_experts: int
  experts_per_token: int
  expert_dim: int
  shared_expert_dim: int
  capacity_factor: float
  router: str
  router_normalize: bool
  router_multiplier: float
  router_bias: bool
  router_noise: float
  router_noise_steps: int
  expert_groups: str
  expert_buffer_factor: float
  expert_chunks: int
  experts_backend: str
  mamba_state_dim: int
  mamba_conv_width: int
  mamba_expand: int
  mamba_num_heads: int
  mamba_head_dim: int
  mamba_num_groups: int
  mamba_norm_groups: int
  mamba_bias: bool
  mamba_conv_bias: bool
  mamba_dt_min: float
  mamba_dt_max: float
  mamba_chunk_tokens: int
  ssd_backend: str

  def __post_init__(self) -> None:
    _require_choice(
      "model",
      self,
      dtype=("bfloat16", "float32"),
      remat=("none", "full", "dots", "named", "offload"),
      qk_norm=("none", "head", "all"),
      attention_bias=("none", "qkv", "all"),
      position=("rope", "none"),
      mlp_activation=("swiglu", "geglu", "gelu", "relu2"),
      router=("softmax", "sigmoid", "grouped"),
      attention_backend=("auto", "reference", "blockwise", "cudnn", "pallas"),
      experts_backend=("auto", "reference", "loop", "sorted", "capacity", "pallas", "tokamax"),
      ssd_backend=("auto", "reference", "chunked", "pallas"),
    )
    may_be_zero = ("pipe_micro_batches", "unroll", "shared_expert_dim", "router_noise_steps", "mamba_num_heads")
    counts = [f.name for f in dataclasses.fields(self) if f.type is int and f.name not in may_be_zero]
    _require_at_least("model", self, 1, *counts)
    at_least_zero = ("capacity_factor", "logits_soft_cap", "attention_soft_cap", "attention_scale", "qkv_clip")
    _require_at_least("model", self, 0, *may_be_zero, *at_least_zero)
    _require_at_least("model", self, 0, "router_noise", "mamba_dt_min", "mamba_dt_max")
    _require_at_least("model", self, 1, "expert_buffer_factor")
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
        f"choose num_kv_heads in {_divisors(self.num_heads)}"
      )
    if self.head_dim % 2:
      raise ConfigError(f"model.head_dim={self.head_dim} is odd; rotary embeddings need an even head_dim")
    if self.experts_per_token > self.num_experts:
      raise ConfigError(
        f"model.experts_per_token={self.experts_per_token} exceeds model.num_experts={self.num_experts}; "
        f"choose at most {self.num_experts}"
      )
    if (self.router == "grouped") != bool(self.expert_groups):
      raise ConfigError(
        f"model.router={self.router!r} and model.expert_groups={self.expert_groups!r} contradict each other; "
        "only the grouped router has groups, as in 'knowledge=4,skill=2,meta=1,safety=1'"
      )
    if self.expert_groups and sum(self.expert_group_sizes.values()) != self.num_experts:
      raise ConfigError(
        f"model.expert_groups={self.expert_groups!r} hold {sum(self.expert_group_sizes.values())} experts and "
        f"model.num_experts={self.num_experts}; make them equal"
      )
    inner_dim = self.mamba_expand * self.embed_dim
    if not self.mamba_num_heads and inner_dim % self.mamba_head_dim:
      raise ConfigError(
        f"mamba_expand * embed_dim = {inner_dim} is not a multiple of model.mamba_head_dim={self.mamba_head_dim}; "
        f"choose mamba_head_dim in {_divisors(inner_dim)}"
      )
    for key in ("mamba_num_groups", "mamba_norm_groups"):
      if self.mamba_heads % getattr(self, key):
        raise ConfigError(
          f"{self.mamba_heads} Mamba heads are not a multiple of model.{key}={getattr(self, key)}; "
          f"choose {key} in {_divisors(self.mamba_heads)}"
        )

  @property
  def mamba_heads(self) -> int:
    return self.mamba_num_heads or self.mamba_expand * self.embed_dim // self.mamba_head_dim

  @property
  def expert_group_sizes(self) -> dict[str, int]:
    """Names and sizes of the expert groups, in the order of the experts; empty without groups."""
    sizes = {}
    for item in filter(None, self.expert_groups.split(",")):
      name, _, size = item.partition("=")
      if not name.isidentifier() or not size.isdigit() or not int(size) or name in sizes:
        raise ConfigError(
          f"model.expert_groups={self.expert_groups!r}: {item!r} is not a new NAME=SIZE; write for example "
          "'knowledge=4,skill=2,meta=1,safety=1'"
        )
      sizes[name] = int(size)
    return sizes


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where documents come from and how they become tokens."""

  source: str
  tokenizer: str
  validation_fraction: float

  def __post_init__(self) -> None:
    _require_fraction("data", self, "validation_fraction")


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
    _require_at_least("mesh", self, 1, "slices")
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
class OptimizerConfig:
  """The update rule and its learning-rate schedule."""

  name: str
  learning_rate: float
  schedule: str
  warmup_steps: int
  final_learning_rate_ratio: float
  beta1: float
  beta2: float
  epsilon: float
  weight_decay: float
  clip_norm: float
  offload: bool
  router_bias_rate: float

  def __post_init__(self) -> None:
    _require_fraction("optimizer", self, "beta1", "beta2")
    _require_at_least(
      "optimizer",
      self,
      0,
      "learning_rate",
      "warmup_steps",
      "weight_decay",
      "final_learning_rate_ratio",
      "router_bias_rate",
    )
    for key in ("epsilon", "clip_norm"):
      if not getattr(self, key) > 0:
        raise ConfigError(f"optimizer.{key}={getattr(self, key)} is not positive; choose a value above 0")


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What each auxiliary loss counts beside the language-modelling loss."""

  load_balance_weight: float
  router_z_weight: float
  router_importance_weight: float
  router_entropy_weight: float

  def __post_init__(self) -> None:
    _require_at_least("loss", self, 0, *(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The length and the batch of a run."""

  steps: int
  batch_size: int
  sequence_length: int
  accumulation_steps: int
  seed: int
  log_every_steps: int

  def __post_init__(self) -> None:
    _require_at_least(
      "train", self, 1, "steps", "batch_size", "sequence_length", "accumulation_steps", "log_every_steps"
    )
    _require_at_least("train", self, 0, "seed")
    if self.batch_size % self.accumulation_steps:
      raise ConfigError(
        f"train.batch_size={self.batch_size} is not a multiple of train.accumulation_steps={self.accumulation_steps}; "
        f"choose accumulation_steps in {_divisors(self.batch_size)}"
      )

  @property
  def micro_batch_size(self) -> int:
    """Sequences, over all devices, that one backward pass sees."""
    return self.batch_size // self.accumulation_steps


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """When and on how much of the validation split a run is evaluated."""

  every_steps: int
  num_batches: int

  def __post_init__(self) -> None:
    _require_at_least("evaluate", self, 0, "every_steps")
    _require_at_least("evaluate", self, 1, "num_batches")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are written and how many stay."""

  every_steps: int
  keep_last: int

  def __post_init__(self) -> None:
    _require_at_least("checkpoint", self, 1, "every_steps", "keep_last")


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
    _require_at_least("generate", self, 1, "max_new_tokens")
    _require_at_least("generate", self, 0, "temperature", "top_k", "seed")
    if not 0 < self.top_p <= 1:
      raise ConfigError(f"generate.top_p={self.top_p} is outside (0, 1]; choose 1 to keep every token")
    if not self.repetition_penalty > 0:
      raise ConfigError(f"generate.repetition_penalty={self.repetition_penalty} is not positive; choose 1 for none")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  recipe: str
  model: ModelConfig
  data: DataConfig
  mesh: MeshConfig
  optimizer: OptimizerConfig
  loss: LossConfig
  train: TrainConfig
  evaluate: EvaluateConfig
  checkpoint: CheckpointConfig
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

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


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
  if get_origin(kind) is tuple:
    item = get_args(kind)[0]
    if isinstance(value, (list, tuple)) and all(isinstance(v, item) for v in value):
      return tuple(value)
  elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
    return value
  raise ConfigError(f"{path}={value!r} has type {type(value).__name__}; it takes {getattr(kind, '__name__', kind)}")
