"""Patterns of our layers and lists of theirs."""

import math

from ultrathink_jax import patterns
from ultrathink_jax.config import ModelConfig
from ultrathink_jax.models.layer import groups


def letters_of(model: ModelConfig) -> str:
  """Returns the letter of every layer, first to last."""
  return patterns.spell(groups(model))


def compact(letters: str) -> str:
  """Returns a pattern that spells `letters` in few groups of few layers each: a scan compiles its period once.

  Example: compact("AFAFAFM") == "(AF)x3 M".
  """
  length = len(letters)
  best: list[tuple[float, str]] = [(0, "")] + [(math.inf, "")] * length
  for start in range(length):
    for period in range(1, length - start + 1):
      unit, stop, repeats = letters[start : start + period], start + period, 1
      while True:
        cost = best[start][0] + period + 1  # a scan costs about as much as a layer
        if cost < best[stop][0]:
          group = unit if repeats == 1 else f"({unit})x{repeats}"
          best[stop] = (cost, f"{best[start][1]} {group}".strip())
        if letters[stop : stop + period] != unit:
          break
        stop, repeats = stop + period, repeats + 1
  return best[length][1]
