"""Rules that tell text worth learning from the rest, after Gopher (arXiv:2112.11446) and C4 (arXiv:1910.10683)."""

import functools
from collections.abc import Callable

import numpy as np
import regex

from ultrathink_jax.config import QualityConfig
from ultrathink_jax.data.documents import Document
from ultrathink_jax.data.quality import languages
from ultrathink_jax.data.quality.words import (
  IDEOGRAPH,
  PUNCTUATION,
  SPACE,
  WORD,
  class_table,
  code_point_table,
  count,
  shingles,
  word_hashes,
)
from ultrathink_jax.errors import ConfigError

_REPEATED_WORDS = 10  # shorter runs return in sound text and code, too


def make_filter(options: QualityConfig) -> Callable[[Document], str | None]:
  """Returns a function that gives the reason why a document is left out, or None; it can be pickled.

  Reasons, in the order in which they are looked for: too_short, too_long, long_line, long_lines, low_alphanumeric,
  much_punctuation, other_script, repeated_lines, repeated_words, other_language.
  """
  for script in options.scripts:
    _require_script(script)
  if options.languages:
    languages.require(options.languages)
  return functools.partial(_reason, options)


def _require_script(script: str) -> None:
  is_known = script.isidentifier()
  try:
    regex.compile(rf"\p{{Script={script}}}")
  except regex.error:
    is_known = False
  if not is_known:
    raise ConfigError(
      f"quality.scripts names {script!r}, which is not a Unicode script; write names as Latin, Han, Cyrillic, Arabic"
    )


def _reason(options: QualityConfig, document: Document) -> str | None:
  text = document.text
  return next(filter(None, (rule(options, text) for rule in _RULES)), None)


def _check_length(options: QualityConfig, text: str) -> str | None:
  if options.min_chars and len(text.strip()) < options.min_chars:
    return "too_short"
  return "too_long" if options.max_chars and len(text) > options.max_chars else None


def _check_lines(options: QualityConfig, text: str) -> str | None:
  if options.max_line_chars and max(map(len, text.split("\n"))) > options.max_line_chars:
    return "long_line"
  if options.max_mean_line_chars:
    num_breaks = text.count("\n")
    if (len(text) - num_breaks) / (num_breaks + 1) > options.max_mean_line_chars:
      return "long_lines"
  return None


def _check_characters(options: QualityConfig, text: str) -> str | None:
  if not text or not (options.min_alphanumeric or options.max_punctuation):
    return None
  counts = count(text, class_table())
  if counts[[SPACE, WORD, IDEOGRAPH]].sum() < options.min_alphanumeric * len(text):
    return "low_alphanumeric"
  if options.max_punctuation and counts[PUNCTUATION] > options.max_punctuation * len(text):
    return "much_punctuation"
  return None


def _check_scripts(options: QualityConfig, text: str) -> str | None:
  if not options.scripts or (text.isascii() and "Latin" in options.scripts):
    return None
  _, num_other, num_accepted = count(text, _script_table(options.scripts))
  return "other_script" if num_accepted < options.min_script * (num_other + num_accepted) else None


@functools.cache
def _script_table(scripts: tuple[str, ...]) -> np.ndarray:
  """Returns 1 for a letter and 2 for one of `scripts`; what all scripts share is neither."""
  accepted = "".join(rf"\p{{Script={script}}}" for script in scripts)
  return code_point_table({
    1: r"[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]+",
    2: rf"[\p{{L}}&&[{accepted}]]+",
  })  # fmt: skip


def _check_repetition(options: QualityConfig, text: str) -> str | None:
  if not options.max_repetition:
    return None
  lines = list(filter(None, map(str.strip, text.split("\n"))))
  num_chars = sum(map(len, lines))
  if num_chars - sum(map(len, set(lines))) > options.max_repetition * num_chars:
    return "repeated_lines"
  runs = np.sort(shingles(word_hashes(text), _REPEATED_WORDS))
  num_repeated = np.count_nonzero(runs[1:] == runs[:-1])
  return "repeated_words" if num_repeated > options.max_repetition * len(runs) else None


def _check_language(options: QualityConfig, text: str) -> str | None:
  if not options.languages:
    return None
  language, confidence = languages.identify(text)
  return None if language in options.languages and confidence >= options.min_language else "other_language"


_RULES = (_check_length, _check_lines, _check_characters, _check_scripts, _check_repetition, _check_language)
