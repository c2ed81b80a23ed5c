"""What is made of a source tree, and how much of it."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ultrathink_jax.config import CodeConfig
from ultrathink_jax.errors import ConfigError

KINDS = ("file", "chunk", "item", "complete", "doc", "test", "fim", "repo", "commit")
FIM_LEVELS = ("char", "line", "item")
EXCLUDED = (
  "target/", "build/", "dist/", "out/", "generated/", "vendor/", "vendored/", "third_party/", "third-party/",
  "node_modules/", "bower_components/", "site-packages/", "__pycache__/", "venv/", "*.egg-info/",
)  # fmt: skip
_MIN_SAMPLE_TOKENS = 64  # less holds no header beside code
_CHOICES = {
  "split_by": ("file", "module"),
  "tests": ("split", "keep", "drop"),
  "secrets": ("scrub", "drop", "keep"),
  "near_duplicates": ("drop", "keep"),
  "fim_learned": ("all", "middle"),
}
_LEAST = {
  "min_tokens": 0, "max_tokens": _MIN_SAMPLE_TOKENS, "overlap_tokens": 0, "repo_tokens": _MIN_SAMPLE_TOKENS,
  "max_file_bytes": 1, "max_line_chars": 1, "max_mean_line_chars": 1, "max_commits": 1, "max_per_file": 1, "workers": 1,
}  # fmt: skip
_FRACTIONS = ("validation_fraction", "test_fraction", "fim_spm_rate", "min_alphanumeric")


@dataclasses.dataclass(frozen=True)
class CodeOptions:
  """Options of the builder; the same options and files give the same bytes.

  Attributes:
    kinds: the share, 0 to 1, of the candidates of each kind of sample that is kept; none of a kind that is not named.
    max_per_kind: at most so many samples of a kind, over all splits.
    max_per_file: at most so many samples whose first file is the same.
    max_tokens: of a sample; a file with more is cut into chunks that share `overlap_tokens`.
    repo_tokens: of a sample of kind repo.
    min_tokens: a sample with fewer is left out.
    split_by: "file" keeps each file and its near duplicates in one split; "module" keeps whole crates and packages, or
      where there are none top folders, in one.
    tests: "split" takes tests out of the samples of the file they stand in, and makes samples of their own of them;
      "keep" leaves them where they are as well; "drop" removes them.
    secrets: what happens to a file with credentials in it.
    fim_spm_rate: the share of fill-in-the-middle samples in the order suffix, prefix, middle.
    fim_levels: how often a middle is cut at any character, at lines, or is the body of a function, relative to the sum.
    fim_learned: "all" gives a sample that is learned as a whole, "middle" one of which only the middle is.
    exclude: patterns of paths to leave out, in the syntax of .gitignore.
    languages: names to which files are limited; none means all.
    licences: SPDX identifiers to which files are limited, "unknown" among them or not; none means all.
    max_commits: how many of the latest commits are looked at, where `kinds` asks for commits.
    workers: processes; by default one, or one per core for a large tree. It does not change what is written.
  """

  kinds: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {kind: 0.5 if kind == "fim" else 1.0 for kind in KINDS if kind != "commit"}
  )
  max_per_kind: Mapping[str, int] = dataclasses.field(default_factory=dict)
  max_per_file: int | None = None
  max_tokens: int = 2048
  overlap_tokens: int = 128
  repo_tokens: int = 8192
  min_tokens: int = 8
  validation_fraction: float = 0.05
  test_fraction: float = 0.05
  split_by: str = "file"
  tests: str = "split"
  secrets: str = "scrub"
  near_duplicates: str = "drop"
  fim_spm_rate: float = 0.5
  fim_levels: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(FIM_LEVELS, 1.0))
  fim_learned: str = "all"
  exclude: tuple[str, ...] = EXCLUDED
  use_gitignore: bool = True
  languages: tuple[str, ...] = ()
  licences: tuple[str, ...] = ()
  max_file_bytes: int = 1024 * 1024
  max_line_chars: int = 1000
  max_mean_line_chars: int = 200
  min_alphanumeric: float = 0.25
  max_commits: int = 1000
  seed: int = 0
  workers: int | None = None

  def __post_init__(self):
    for key, choices in _CHOICES.items():
      _check_name(key, getattr(self, key), choices)
    for key, least in _LEAST.items():
      value = getattr(self, key)
      if value is not None and value < least:
        raise ConfigError(f"code option {key}={value} is too small; choose {least} or more")
    for key in _FRACTIONS:
      _check_fraction(key, getattr(self, key))
    for key in ("kinds", "max_per_kind"):
      for kind in getattr(self, key):
        _check_name(key, kind, KINDS)
    for kind, share in self.kinds.items():
      _check_fraction(f"kinds[{kind}]", share)
    for kind, limit in self.max_per_kind.items():
      if limit < 0:
        raise ConfigError(f"code option max_per_kind[{kind}]={limit} is negative; choose 0 or more")
    for level, weight in self.fim_levels.items():
      _check_name("fim_levels", level, FIM_LEVELS)
      if weight < 0:
        raise ConfigError(f"code option fim_levels[{level}]={weight} is negative; choose 0 or more")
    self._check_together()

  def _check_together(self) -> None:
    if self.validation_fraction + self.test_fraction >= 1:
      raise ConfigError(
        f"code options validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave "
        "nothing to train on; choose a sum below 1"
      )
    if 2 * self.overlap_tokens > self.max_tokens:
      raise ConfigError(
        f"code option overlap_tokens={self.overlap_tokens} is more than half of max_tokens={self.max_tokens}; "
        f"choose at most {self.max_tokens // 2}"
      )
    if self.kinds.get("fim") and not sum(self.fim_levels.values()) > 0:
      raise ConfigError("code option fim_levels has no weight above 0; give one, or leave fim out of kinds")

  def settings(self) -> dict[str, Any]:
    """Returns what decides the outcome."""
    settings = dataclasses.asdict(self)
    del settings["workers"]
    return settings


def make_options(config: CodeConfig, validation_fraction: float, workers: int) -> CodeOptions:
  """Returns the options that the section `code` spells, in which 0 stands for no limit. Raises ConfigError."""
  given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  given |= {"exclude": (*EXCLUDED, *config.exclude), "max_per_file": config.max_per_file or None}
  return CodeOptions(validation_fraction=validation_fraction, workers=workers or None, **given)


def _check_name(key: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"code option {key}={value!r} is not one of {', '.join(choices)}{hint}")


def _check_fraction(key: str, value: float) -> None:
  if not 0 <= value <= 1:
    raise ConfigError(f"code option {key}={value} is not a share; choose a number from 0 to 1")
