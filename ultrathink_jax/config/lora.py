"""The section `lora`: what is adapted, and how the base under it is kept."""

import dataclasses
import math

from ultrathink_jax.config.checks import require_at_least, require_choice, require_fraction, require_positive
from ultrathink_jax.errors import ConfigError

QUANTIZED = ("int8", "int4", "nf4")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters beside frozen weight matrices. Source: arXiv:2106.09685."""

  rank: int
  expert_rank: int
  alpha: float
  dropout: float
  targets: tuple[str, ...]
  rank_pattern: tuple[str, ...]
  alpha_pattern: tuple[str, ...]
  scaling: str
  variant: str
  init: str
  rate_ratio: float
  base_dtype: str

  def __post_init__(self) -> None:
    require_at_least("lora", self, 0, "rank", "expert_rank")
    require_fraction("lora", self, "dropout")
    require_choice(
      "lora",
      self,
      scaling=("standard", "rslora"),
      variant=("lora", "dora"),
      init=("kaiming", "pissa"),
      base_dtype=("float32", "bfloat16", *QUANTIZED),
    )
    require_positive("lora", self, "alpha", "rate_ratio")
    if self.rank and not self.targets:
      raise ConfigError("lora.targets=() adapts nothing; choose ('attention',) or ('all',)")
    if self.init == "pissa" and (self.variant == "dora" or self.base_dtype in QUANTIZED):
      other = "lora.variant='dora'" if self.variant == "dora" else f"lora.base_dtype={self.base_dtype!r}"
      raise ConfigError(f"lora.init='pissa' with {other} is not defined; choose lora.init='kaiming'")
    for key in ("rank_pattern", "alpha_pattern"):
      for entry in getattr(self, key):
        split_pattern(f"lora.{key}", entry)

  def scale(self, rank: int, alpha: float) -> float:
    """Returns what an adapter's output counts: alpha / rank, or alpha / sqrt(rank) (arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)


def split_pattern(key: str, entry: str) -> tuple[str, float]:
  """Returns the pattern and the value of PATTERN=VALUE. Raises ConfigError where it is none."""
  pattern, _, text = entry.rpartition("=")
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not pattern or not 0 < value < math.inf or (key.endswith("rank_pattern") and value % 1):
    what = "a whole number" if key.endswith("rank_pattern") else "a number"
    raise ConfigError(f"{key} has {entry!r}, which is not PATTERN=VALUE with {what} above 0; write '*.query=8'")
  return pattern, value
