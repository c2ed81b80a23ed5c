"""Which function a test tests, found by its name: test_parse_header is for parse_header if it mentions it."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ultrathink_jax.data.code.samples import Place

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_ENDINGS = ("", "s", "es", "d", "ed", "ing")


class Function(NamedTuple):
  """A function that tests may be for."""

  file: str
  place: Place


def link(test: Place, file: str, text: str, functions: Mapping[str, list[Function]]) -> Function | None:
  """Returns the function of the test `text` in `file`, or None.

  Its name is a run of the words in the test's name and stands in the text; the longest such name wins, then the
  function that is nearest by path.

  Args:
    functions: of the test's split, by their simple names.
  """
  words = [word.lower() for word in _WORD.findall(test.simple_name)]
  names = {name for name in set(_IDENTIFIER.findall(text)) if name in functions and name != test.simple_name}
  lengths = {name: len(parts) for name in names if (parts := _run(name, words))}
  if not lengths:
    return None
  name = min(lengths, key=lambda name: (-lengths[name], -len(name), name))
  return min(
    functions[name], key=lambda function: (-common_parts(function.file, file), function.file, function.place.span)
  )


def common_parts(first: str, second: str) -> int:
  """Returns how many parts two paths have in common from the start; the same path has one more than it has folders."""
  count = 0
  for a, b in zip(first.split("/"), second.split("/"), strict=False):
    if a != b:
      break
    count += 1
  return count


def _run(name: str, words: list[str]) -> list[str]:
  """Returns the words of a name if they follow one another among `words`, the last perhaps with an ending, else []."""
  parts = [part.lower() for part in _WORD.findall(name)]
  for start in range(len(words) - len(parts) + 1):
    run = words[start : start + len(parts)]
    if parts and run[:-1] == parts[:-1] and any(run[-1] == parts[-1] + ending for ending in _ENDINGS):
      return parts
  return []
