"""The layer pattern: a string such as "(MMMMAFMMME)x4" that spells the depth of a model, one letter a layer."""

import re
from typing import NamedTuple

from ultrathink_jax.errors import ConfigError


class Group(NamedTuple):
  """`repeats` copies of the layers spelled by `letters`, run as one scan over its periods."""

  letters: str
  repeats: int


def parse(pattern: str, letters: str) -> tuple[Group, ...]:
  """Returns the groups of `pattern`, whose layers must be spelled with the given `letters`.

  Grammar: groups follow one another, blanks are ignored; a group is LETTERS or (LETTERS) or (LETTERS)xN with N >= 1.

  Example: parse("M (MA)x2", "AM") == (Group("M", 1), Group("MA", 2)).

  Raises:
    ConfigError: naming the first character that is wrong and its place, counted from 1.
  """

  def refuse(place: int, rule: str) -> ConfigError:
    seen = f"character {place + 1} ({pattern[place]!r})" if place < len(pattern) else "its end"
    return ConfigError(f"model.layers={pattern!r} is wrong at {seen}: {pattern[:place]}>>>{pattern[place:]} {rule}")

  groups = []
  place = 0
  while place < len(pattern):
    if pattern[place].isspace():
      place += 1
      continue
    is_bracketed = pattern[place] == "("
    start = place = place + is_bracketed
    while place < len(pattern) and pattern[place] in letters:
      place += 1
    if place == start:
      raise refuse(place, f"a layer letter belongs here, one of {' '.join(sorted(letters))}")
    spelled, repeats = pattern[start:place], 1
    if is_bracketed:
      if place == len(pattern) or pattern[place] != ")":
        raise refuse(place, f"only layer letters ({' '.join(sorted(letters))}) and a closing ')' belong here")
      place += 1
      if place < len(pattern) and pattern[place] == "x":
        number = re.match(r"[1-9][0-9]*", pattern[place + 1 :])
        if number is None:
          raise refuse(place + 1, "a repeat count of at least 1 belongs here, as in (AF)x12")
        repeats = int(number.group())
        place += 1 + number.end()
    groups.append(Group(spelled, repeats))
  if not groups:
    raise refuse(0, "a model needs at least one layer, as in (AF)x12")
  return tuple(groups)


def spell(groups: tuple[Group, ...]) -> str:
  """Returns every layer letter of the model in order, repeats written out."""
  return "".join(group.letters * group.repeats for group in groups)
