"""The sections `model` and `model.rope`."""

import dataclasses

from ultrathink_jax.config.checks import divisors, require_at_least, require_choice
from ultrathink_jax.errors import ConfigError


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
    require_choice("model.rope", self, scaling=("none", "linear", "dynamic", "yarn", "llama3"))
    require_at_least("model.rope", self, 1, "factor", "original_tokens")
    require_at_least("model.rope", self, 0, "attention_factor")
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
    require_choice(
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
    require_at_least("model", self, 1, *counts)
    at_least_zero = ("capacity_factor", "logits_soft_cap", "attention_soft_cap", "attention_scale", "qkv_clip")
    require_at_least("model", self, 0, *may_be_zero, *at_least_zero)
    require_at_least("model", self, 0, "router_noise", "mamba_dt_min", "mamba_dt_max")
    require_at_least("model", self, 1, "expert_buffer_factor")
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
        f"choose num_kv_heads in {divisors(self.num_heads)}"
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
        f"choose mamba_head_dim in {divisors(inner_dim)}"
      )
    for key in ("mamba_num_groups", "mamba_norm_groups"):
      if self.mamba_heads % getattr(self, key):
        raise ConfigError(
          f"{self.mamba_heads} Mamba heads are not a multiple of model.{key}={getattr(self, key)}; "
          f"choose {key} in {divisors(self.mamba_heads)}"
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
