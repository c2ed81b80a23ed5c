"""How names and values are written into messages of one line."""

import itertools
from collections.abc import Iterable


def printable(name: str) -> str:
  """Returns a name without line breaks and other control characters, different for every name."""
  if name.isprintable() and "\\" not in name:
    return name
  return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def quote(value: object, max_chars: int = 30) -> str:
  """Returns a value as Python writes it, cut short."""
  words = repr(value[: max_chars + 1] if isinstance(value, str) else value)
  return words if len(words) <= max_chars + 2 else f"{words[:max_chars]}..."


def in_short(error: BaseException, max_chars: int = 100) -> str:
  """Returns what a library says of an error, as one short line."""
  words = printable(" ".join(str(error).split())) or type(error).__name__
  return words if len(words) <= max_chars else f"{words[:max_chars]}..."


def names_of(fields: Iterable[object]) -> str:
  """Returns the first few names of fields."""
  names = [quote(name, 16) for name in itertools.islice(fields, 4)]
  return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "no fields"


def kind_of(value: object) -> str:
  """Returns what JSON calls the kind of a value, with its article."""
  if value is None:
    return "null"
  for kinds, words in (
    (bool, "a boolean"),
    (str, "a string"),
    ((int, float), "a number"),
    (list, "a list"),
    (dict, "an object"),
    (bytes, "bytes that are not UTF-8"),
  ):
    if isinstance(value, kinds):
      return words
  return f"a {type(value).__name__}"
