"""The `jsonl:PATH` source: a JSON object on each line, or a .json file that is one list; plain, .gz or .zst.

Entries are named FILE:LINE from 1, those of a list FILE#INDEX from 0. Blank lines are passed over. A line that is no
object is rejected and the next one read; a list that is not JSON ends there, since nothing tells where it would go on.
"""

import codecs
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.data.documents import BadRecordError, Corpus, Record, Reject, Shard, excerpt
from ultrathink_jax.data.sources.files import File, Found, find_files, is_url
from ultrathink_jax.data.sources.json_objects import parse_list, parse_object, require_object
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.sources.streams import is_compressed, read_blocks
from ultrathink_jax.data.wording import printable
from ultrathink_jax.errors import DataError

_SUFFIXES = r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$"
_SHARD_BYTES = 8 * 1024 * 1024
_ENDLESS = 16  # times the longest line that is read: what has no line end by then is not in lines
_WHITE_SPACE = b" \t\r\n"


class JsonlShard(NamedTuple):
  """The lines of a file from byte `start` to `stop`; the first of them has the number `first_line`."""

  name: str
  num_bytes: int
  file: str
  path: str
  start: int
  stop: int | None
  first_line: int
  max_bytes: int

  def read(self) -> Iterator[Record | Reject]:
    lines = split_lines(read_blocks(self.path, self.start, self.stop), self.max_bytes, self.path)
    for number, line in enumerate(lines, self.first_line):
      where = f"{self.file}:{number}"
      if line is None:
        yield Reject(where, f"is longer than {self.max_bytes:,} bytes")
      elif line.strip(_WHITE_SPACE):
        try:
          yield Record(where, parse_object(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line))
        except BadRecordError as error:
          yield Reject(where, str(error), excerpt(line))


class JsonListShard(NamedTuple):
  """A file that is a JSON list."""

  name: str
  num_bytes: int
  path: str
  max_bytes: int

  def read(self) -> Iterator[Record | Reject]:
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    index = 0
    try:
      texts = (decode(block) for block in read_blocks(self.path))
      for index, item in enumerate(parse_list(texts, self.max_bytes)):
        where = f"{self.name}#{index}"
        try:
          yield Record(where, require_object(item))
        except BadRecordError as error:
          yield Reject(where, str(error), excerpt(str(item)))
    except UnicodeDecodeError as error:
      raise DataError(f"{printable(self.path)} is not UTF-8 after item {index}; convert it") from error
    except BadRecordError as error:
      raise DataError(f"{printable(self.path)} {error}, after item {index}; write one object on each line") from error


def jsonl_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the JSON files that `argument` names."""
  del directory
  found = find_files(argument, "jsonl", log, _SUFFIXES)
  return Corpus(found.identity("jsonl", options.max_record_bytes), functools.partial(_open, found, options))


def _open(found: Found, options: SourceOptions) -> dict[str, Sequence[Shard]]:
  shards: list[Shard] = list(found.refused)
  for file in found.files:
    if file.size:
      shards += _shards(file, options.max_record_bytes)
  return {"": shards}


def _shards(file: File, max_bytes: int) -> list[Shard]:
  if _is_list(file):
    return [JsonListShard(file.name, max(file.size, 0), file.path, max_bytes)]
  if is_compressed(file.path) or is_url(file.path) or file.size < 2 * _SHARD_BYTES:
    return [JsonlShard(file.name, max(file.size, 0), file.name, file.path, 0, None, 1, max_bytes)]
  return [
    JsonlShard(f"{file.name}:{line}", stop - start, file.name, file.path, start, stop, line, max_bytes)
    for start, stop, line in line_ranges(read_blocks(file.path), _SHARD_BYTES)
  ]


def _is_list(file: File) -> bool:
  """Returns whether a .json file begins with a bracket."""
  if not file.name.removesuffix(".gz").removesuffix(".zst").endswith(".json"):
    return False
  with contextlib.closing(read_blocks(file.path)) as blocks:
    return next(blocks, b"").removeprefix(codecs.BOM_UTF8).lstrip(_WHITE_SPACE).startswith(b"[")


def split_lines(blocks: Iterable[bytes], max_bytes: int, path: str) -> Iterator[bytes | None]:
  """Yields the lines of a file without their ends; None for one above `max_bytes`, which is never held.

  Raises:
    DataError: there is no line end for so long that the file is not in lines.
  """
  parts: list[bytes] = []  # of the line whose end is not there yet
  size = 0
  for block in blocks:
    first, *lines = block.split(b"\n")
    size += len(first)
    if size <= max_bytes:
      parts.append(first)
    elif size > _ENDLESS * max_bytes:
      raise DataError(f"{printable(path)} has a line of more than {_ENDLESS * max_bytes:,} bytes; it is not JSONL")
    else:
      parts.clear()
    if lines:
      yield b"".join(parts) if size <= max_bytes else None
      last = lines.pop()
      for line in lines:
        yield line if len(line) <= max_bytes else None
      parts, size = [last], len(last)
  if size:
    yield b"".join(parts) if size <= max_bytes else None


def line_ranges(blocks: Iterable[bytes], range_bytes: int) -> list[tuple[int, int, int]]:
  """Returns (start, stop, number of the first line from 1) of ranges of whole lines, each of `range_bytes` or more."""
  starts, offset, num_lines = [(0, 1)], 0, 0
  for block in blocks:
    begin = 0
    while True:
      wanted = starts[-1][0] + range_bytes - 1 - offset
      found = block.find(b"\n", max(begin, wanted)) if wanted < len(block) else -1
      if found < 0:
        break
      num_lines += block.count(b"\n", begin, found + 1)
      begin = found + 1
      starts.append((offset + begin, num_lines + 1))
    num_lines += block.count(b"\n", begin)
    offset += len(block)
  stops = [start for start, _ in starts[1:]] + [offset]
  return [(start, stop, line) for (start, line), stop in zip(starts, stops, strict=True) if start < stop]
