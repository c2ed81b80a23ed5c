"""The section `code`: what data.source=code:PATH makes of a source tree. Ranges are checked where it is built."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class CodeConfig:
  """The kinds of samples, their sizes, and which files they are made of."""

  kinds: Mapping[str, float]
  max_per_file: int
  max_tokens: int
  overlap_tokens: int
  repo_tokens: int
  min_tokens: int
  test_fraction: float
  split_by: str
  tests: str
  secrets: str
  near_duplicates: str
  fim_spm_rate: float
  fim_levels: Mapping[str, float]
  fim_learned: str
  exclude: tuple[str, ...]
  languages: tuple[str, ...]
  licences: tuple[str, ...]
  max_commits: int
