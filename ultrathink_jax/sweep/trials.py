"""Which trials a sweep makes: a grid over values of keys, or random draws from ranges."""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ultrathink_jax.config import Config
from ultrathink_jax.errors import ConfigError

_SCALES = ("log", "linear")
_LONGEST_NAME = 100  # characters of a directory
_OWN_FLAGS = ("workdir", "mode", "sweep", "sweep_random", "sweep_seed", "sweep_parallel")


class Request(NamedTuple):
  """What a sweep is asked for.

  Attributes:
    axes: KEY=VALUE,VALUE,... or, for random draws, KEY=log:LOW:HIGH and KEY=linear:LOW:HIGH too.
    num_random: how many draws to make; 0: every combination of the values.
    seed: of the draws.
    num_parallel: how many trials run at a time.
  """

  axes: tuple[str, ...]
  num_random: int = 0
  seed: int = 0
  num_parallel: int = 1


class Trial(NamedTuple):
  """A run of a sweep: what it is called, the keys it sets, as text, and the configuration that makes."""

  name: str
  values: dict[str, str]
  config: Config


class _Range(NamedTuple):
  """Numbers from `low` to `high`, evenly by themselves or by their logarithms."""

  scale: str
  low: float
  high: float

  def at(self, share: float) -> float:
    if self.scale == "linear":
      return self.low + share * (self.high - self.low)
    return math.exp(math.log(self.low) + share * math.log(self.high / self.low))


def make_trials(request: Request, config: Config, make_config: Callable[[list[str]], Config]) -> list[Trial]:
  """Returns the trials of a sweep around `config`, each checked; draws repeat with the seed, more begin with the same.

  `make_config` takes --config.KEY=VALUE flags beside those of the command line. Raises ConfigError for an axis that is
  wrong and for every trial whose configuration is.
  """
  axes = _parse(request)
  combinations = _draw(request, axes, config) if request.num_random else _combine(axes)
  names = spell_names(combinations)
  return [
    Trial(name, values, make_config([f"--config.{key}={value}" for key, value in values.items()]))
    for name, values in zip(names, combinations, strict=True)
  ]


def _parse(request: Request) -> dict[str, list[str] | _Range]:
  if not request.axes:
    raise ConfigError("mode sweep needs --sweep=KEY=VALUE,VALUE,...; as --sweep=optimizer.learning_rate=1e-4,3e-4")
  axes: dict[str, list[str] | _Range] = {}
  for axis in request.axes:
    key, _, text = axis.partition("=")
    key = key.removeprefix("config.")
    if not re.fullmatch(r"\w+(\.\w+)*", key) or not text:
      raise ConfigError(f"--sweep={axis} is not KEY=VALUE,VALUE,...; write it like optimizer.learning_rate=1e-4,3e-4")
    if key in axes:
      raise ConfigError(f"--sweep={axis} names {key} a second time; give all its values at once")
    axes[key] = _range(axis, text) if text.split(":")[0] in _SCALES else _split(axis, text)
    if isinstance(axes[key], _Range) and not request.num_random:
      raise ConfigError(f"--sweep={axis} is a range, which a grid cannot have; add --sweep_random=N for N draws")
  return axes


def _range(axis: str, text: str) -> _Range:
  scale, *limits = text.split(":")
  try:
    low, high = map(float, limits)
  except ValueError as error:
    raise ConfigError(
      f"--sweep={axis} has a range that is not {scale}:LOW:HIGH; write it like log:1e-4:1e-2"
    ) from error
  if not (math.isfinite(high) and low < high and (scale == "linear" or low > 0)):
    raise ConfigError(f"--sweep={axis} has no numbers between {low:g} and {high:g}; a {scale} range rises" + (
      " from above 0" if scale == "log" else ""
    ))  # fmt: skip
  return _Range(scale, low, high)


def _split(axis: str, text: str) -> list[str]:
  """Returns the values between commas, of which those inside brackets and quotes divide nothing."""
  values, depth, quote = [""], 0, ""
  for letter in text:
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "'\"":
      quote = letter
    else:
      depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth and not quote:
      values.append("")
    else:
      values[-1] += letter
  values = [value.strip() for value in values]
  if len(set(values)) < len(values) or "" in values:
    raise ConfigError(f"--sweep={axis} has a value that is empty or there twice; give each value once")
  return values


def _combine(axes: Mapping[str, Any]) -> list[dict[str, str]]:
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _draw(request: Request, axes: Mapping[str, Any], config: Config) -> list[dict[str, str]]:
  draws = []
  for number in range(request.num_random):
    generator = np.random.default_rng([request.seed, number])
    draws.append({key: _choose(axis, generator.random(), value_of(config, key)) for key, axis in axes.items()})
  return draws


def _choose(axis: list[str] | _Range, share: float, like: Any) -> str:
  """Returns the value a share of the way along an axis, of the type of `like`."""
  if isinstance(axis, list):
    return axis[int(share * len(axis))]
  value = axis.at(share)
  return str(round(value)) if isinstance(like, int) else f"{value:.4g}"


def value_of(config: Config, key: str) -> Any:
  """Returns the value of a dotted key. Raises ConfigError where there is none."""
  value: Any = config
  for part in key.split("."):
    if not hasattr(value, part):
      raise ConfigError(f"--sweep={key}: there is no key {part!r}; configs/base.py lists every key")
    value = getattr(value, part)
  return value


def spell_names(combinations: Sequence[Mapping[str, str]]) -> list[str]:
  """Returns a name for each trial that tells its values, can be a directory and is its own."""
  keys = list(combinations[0])
  last = Counter(key.rpartition(".")[2] for key in keys)
  short = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys}
  spelled = ["_".join(f"{short[key]}={value}" for key, value in values.items()) for values in combinations]
  clean = [re.sub(r"[^\w.=+-]+", "-", name).strip("-")[:_LONGEST_NAME] for name in spelled]
  counts = Counter(clean)
  mark = lambda name: hashlib.sha256(name.encode()).hexdigest()[:8]
  return [
    f"{name}-{mark(whole)}" if counts[name] > 1 or len(name) == _LONGEST_NAME else name
    for name, whole in zip(clean, spelled, strict=True)
  ]


def trial_flags(argv: Sequence[str]) -> list[str]:
  """Returns the flags of a sweep's command line that its trials get too: all but where it lives and what it sweeps."""
  kept, skips = [], False
  for argument in argv:
    if skips:
      skips = False
      continue
    name, equals, _ = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name in _OWN_FLAGS:
      skips = not equals  # the value is the next argument
    else:
      kept.append(argument)
  return kept
