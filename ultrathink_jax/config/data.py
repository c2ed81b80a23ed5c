"""The section `data`."""

import dataclasses
import itertools
import math

from ultrathink_jax.config.checks import require_at_least, require_choice, require_fraction
from ultrathink_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where documents come from and how they become rows of tokens."""

  source: str
  mixture: tuple[str, ...]
  stages: tuple[str, ...]
  tokenizer: str
  special_tokens: tuple[str, ...]
  validation_fraction: float
  format: str
  text_field: str
  chat_template: str
  on_error: str
  packing: str
  shuffle: bool
  length_stages: tuple[str, ...]
  workers: int

  def __post_init__(self) -> None:
    require_fraction("data", self, "validation_fraction")
    require_choice(
      "data",
      self,
      format=("auto", "text", "prompt_completion", "messages", "preference", "label"),
      on_error=("strict", "skip"),
      packing=("split", "best_fit"),
    )
    require_at_least("data", self, 0, "workers")
    specs = [spec for spec, _ in self.sources]
    if len(set(specs)) < len(specs):
      raise ConfigError(f"data.mixture={self.mixture} names a source twice; add their weights up")
    for first, weights in self.weights_by_stage:
      if len(weights) != len(specs):
        raise ConfigError(
          f"data.stages has {len(weights)} weights from step {first} on for {len(specs)} sources; give one for each"
        )
    _require_rising("stages", [first for first, _ in self.weights_by_stage])
    _require_rising("length_stages", [first for first, _ in self.positions_by_stage])

  @property
  def sources(self) -> tuple[tuple[str, float], ...]:
    """Every source with its weight."""
    if not self.mixture:
      return ((self.source, 1.0),)
    return tuple(
      (spec, _number("mixture", item, weight)) for item in self.mixture for spec, _, weight in [item.rpartition("=")]
    )

  @property
  def weights_by_stage(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """(first step, weight of each source) of every stage of the mixture; the first one begins at step 0."""
    stages = [
      (_step("stages", item), tuple(_number("stages", item, weight) for weight in item.partition(":")[2].split(",")))
      for item in self.stages
    ]
    if not stages or stages[0][0]:
      stages.insert(0, (0, tuple(weight for _, weight in self.sources)))
    return tuple(stages)

  @property
  def positions_by_stage(self) -> tuple[tuple[int, int], ...]:
    """(first step, most positions of a document in a row) of every stage that limits them."""
    limits = [
      (_step("length_stages", item), _number("length_stages", item, item.partition(":")[2]))
      for item in self.length_stages
    ]
    if any(limit < 1 or limit % 1 for _, limit in limits):
      raise ConfigError(
        f"data.length_stages={self.length_stages} has a limit that is not a number of tokens; write '0:256'"
      )
    return tuple((first, int(limit)) for first, limit in limits)


def _step(key: str, item: str) -> int:
  first = item.partition(":")[0]
  if not first.strip().isdecimal():
    raise ConfigError(
      f"data.{key} has {item!r}, which does not begin with a step; write STEP:VALUE, as '1000:{_EXAMPLES[key]}'"
    )
  return int(first)


def _number(key: str, item: str, text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not (math.isfinite(value) and value >= 0):
    raise ConfigError(f"data.{key} has {item!r}, where {text!r} is not a number of 0 or more; write {_EXAMPLES[key]!r}")
  return value


def _require_rising(key: str, steps: list[int]) -> None:
  if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
    raise ConfigError(f"data.{key} begins at steps {steps}; put them in rising order")


_EXAMPLES = {"mixture": "stdlib=0.7", "stages": "0.7,0.3", "length_stages": "256"}
