"""Files of a package laid end to end, those that others need first."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ultrathink_jax.data.code.languages import LANGUAGES
from ultrathink_jax.data.code.linking import common_parts

_ROOT_NAMES = {"mod", "lib", "main", "__init__", "index"}  # a file that stands for its folder
_LAYOUT_FOLDERS = {"src", "lib"}
_SELF_NAMES = {"crate", "self", "super"}
_SUFFIXES = {suffix.removeprefix(".") for language in LANGUAGES.values() for suffix in language.suffixes}


class Member(NamedTuple):
  """A file of a package, with what it imports and how many tokens it has."""

  name: str
  imports: tuple[str, ...]
  tokens: int


def dependency_order(members: Sequence[Member]) -> list[Member]:
  """Returns the files in an order in which those that one imports come before it, except in a ring of imports."""
  files = {member.name: member for member in sorted(members)}
  index: dict[str, list[tuple[tuple[str, ...], str]]] = {}
  for name in files:
    segments = _segments(name)
    if segments:
      index.setdefault(segments[-1], []).append((segments, name))
  ordered: dict[str, None] = {}
  seen: set[str] = set()
  for name in files:
    stack = [(name, iter((name,)))]
    while stack:
      current, needed = stack[-1]
      following = next((each for each in needed if each not in seen), None)
      if following is not None:
        seen.add(following)
        stack.append((following, _needed(files[following], index)))
      else:
        stack.pop()
        if stack:
          ordered[current] = None
  return [files[name] for name in ordered]


def pack(members: Sequence[Member], max_tokens: int) -> Iterator[list[Member]]:
  """Yields runs of two or more files that follow one another and have at most `max_tokens` tokens together."""
  run: list[Member] = []
  total = 0
  for member in members:
    if run and total + member.tokens > max_tokens:
      if len(run) > 1:
        yield run
      run, total = [], 0
    if member.tokens <= max_tokens:
      run.append(member)
      total += member.tokens
  if len(run) > 1:
    yield run


def _segments(name: str) -> tuple[str, ...]:
  """Returns the name of the module that a file is."""
  *folders, file = name.split("/")
  stem = file.partition(".")[0]
  parts = [part for part in folders if part not in _LAYOUT_FOLDERS] + [stem] * (stem not in _ROOT_NAMES)
  return tuple(part.replace("-", "_") for part in parts)


def _needed(member: Member, index: Mapping[str, list[tuple[tuple[str, ...], str]]]) -> Iterator[str]:
  for text in member.imports:
    parts = [part.replace("-", "_") for part in re.split(r"[./:\\]+", text) if part and part not in _SELF_NAMES]
    if len(parts) > 1 and parts[-1] in _SUFFIXES:
      parts.pop()
    for stop in range(len(parts), 0, -1):
      prefix = tuple(parts[:stop])
      fits = [name for segments, name in index.get(prefix[-1], ()) if segments[-stop:] == prefix]
      fits = [name for name in fits if name != member.name]
      if fits:
        yield min(fits, key=lambda name: (-common_parts(name, member.name), name))
        break
