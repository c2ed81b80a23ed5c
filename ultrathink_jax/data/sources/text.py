"""The `text:PATH` source: every file is a document, or several where it is large.

A file above 1 MiB, a compressed one and a file that is the only one are cut at blank lines into documents of about
16 KiB, so that memory stays bounded and one file still gives both splits. A piece is named PATH#OFFSET after the byte
at which it starts. A byte order mark at the start of a file is left out.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.data.documents import Corpus, Record, Reject, Shard, excerpt
from ultrathink_jax.data.sources.files import File, Found, Refused, find_files
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.sources.streams import is_compressed, read_blocks
from ultrathink_jax.data.wording import printable
from ultrathink_jax.errors import DataError

_PIECE_BYTES = 16 * 1024
_MIN_PIECES = 20  # a small file that is the only one gives smaller pieces rather than fewer
_WHOLE_FILE_BYTES = 1024 * 1024
_SHARD_BYTES = 32 * 1024 * 1024
_LONGEST = 5  # times as long as asked for may a piece become
_HEAD_BYTES = 8 * 1024
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_LINE_END = re.compile(rb"\n")
_CHARACTER = re.compile(rb"(?=[\x00-\x7f\xc0-\xff])")
_BYTE_ORDER_MARK = "\ufeff"


class TextShard(NamedTuple):
  """The bytes of a file from `start` to `stop`, in pieces of about `piece_bytes`, or whole where that is 0."""

  name: str
  num_bytes: int
  path: str
  start: int
  stop: int | None
  piece_bytes: int
  text_field: str

  def read(self) -> Iterator[Record | Reject]:
    blocks = read_blocks(self.path, self.start, self.stop)
    if not self.piece_bytes:
      yield self._entry(self.name, 0, b"".join(blocks))
      return
    file = self.name.rpartition("#")[0]
    for offset, piece in cut(blocks, self.piece_bytes):
      yield self._entry(f"{file}#{self.start + offset}", self.start + offset, piece)

  def _entry(self, where: str, offset: int, content: bytes) -> Record | Reject:
    if b"\0" in content:
      return Reject(where, "holds NUL bytes, so it is no text", excerpt(content))
    try:
      text = content.decode()
    except UnicodeDecodeError as error:
      wrong = f"is not UTF-8 text: byte 0x{content[error.start]:02x} at position {offset + error.start}"
      return Reject(where, wrong, excerpt(content))
    return Record(where, {self.text_field: text.removeprefix(_BYTE_ORDER_MARK) if not offset else text})


def text_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the text files that `argument` names."""
  del directory
  found = find_files(argument, "text", log)
  identity = found.identity("text", _PIECE_BYTES, _MIN_PIECES, _WHOLE_FILE_BYTES, _SHARD_BYTES)
  return Corpus(identity, functools.partial(_open, found, options.text_field))


def _open(found: Found, text_field: str) -> dict[str, Sequence[Shard]]:
  files = [file for file in found.files if file.size]
  shards: list[Shard] = list(found.refused)
  for file in files:
    if is_compressed(file.path) or file.size > _WHOLE_FILE_BYTES:
      shards += _regions(file, text_field)
    elif len(files) == 1:
      piece_bytes = max(1, min(_PIECE_BYTES, file.size // _MIN_PIECES))
      shards.append(TextShard(f"{file.name}#0", file.size, file.path, 0, None, piece_bytes, text_field))
    else:
      shards.append(TextShard(file.name, max(file.size, 0), file.path, 0, None, 0, text_field))
  return {"": shards}


def _regions(file: File, text_field: str) -> list[Shard]:
  """Returns the shards of a large file, which start where a piece may start."""
  if is_compressed(file.path):
    return [TextShard(f"{file.name}#0", max(file.size, 0), file.path, 0, None, _PIECE_BYTES, text_field)]
  if b"\0" in _window(file.path, 0, _HEAD_BYTES):
    return [Refused(file.name, "holds NUL bytes, so it is no text")]
  starts = [0]
  for start in range(_SHARD_BYTES, file.size - _SHARD_BYTES // 2, _SHARD_BYTES):
    window = _window(file.path, start, start + _LONGEST * _PIECE_BYTES)
    starts.append(start + _next_piece(window, 0, _PIECE_BYTES))
  return [
    TextShard(f"{file.name}#{start}", stop - start, file.path, start, stop, _PIECE_BYTES, text_field)
    for start, stop in zip(starts, [*starts[1:], file.size], strict=True)
  ]


def _window(path: str, start: int, stop: int) -> bytes:
  with contextlib.closing(read_blocks(path, start, stop)) as blocks:
    window = b"".join(blocks)
  if not window:
    raise DataError(f"{printable(path)} became shorter while it was read; leave files alone that are being prepared")
  return window


def cut(blocks: Iterable[bytes], piece_bytes: int) -> Iterator[tuple[int, bytes]]:
  """Yields (offset, piece) of a UTF-8 text: pieces end after blank lines, else lines, else characters.

  A piece has at least `piece_bytes` bytes, except the last, and at most five times as many. The cuts do not depend on
  how the text is divided into blocks.
  """
  data, offset, start = b"", 0, 0
  for block in blocks:
    data, offset, start = data[start:] + block, offset + start, 0
    while len(data) - start >= _LONGEST * piece_bytes:
      stop = _next_piece(data, start, piece_bytes)
      yield offset + start, data[start:stop]
      start = stop
  while len(data) - start > piece_bytes:
    stop = _next_piece(data, start, piece_bytes)
    yield offset + start, data[start:stop]
    start = stop
  if start < len(data):
    yield offset + start, data[start:]


def _next_piece(data: bytes, start: int, piece_bytes: int) -> int:
  """Returns where the piece that begins at `start` ends."""
  first, last = start + piece_bytes, start + _LONGEST * piece_bytes - 4  # leaves room to the end of a character
  found = _BLANK_LINE.search(data, first - 1, last) or _LINE_END.search(data, first - 1, last)
  found = found or _CHARACTER.search(data, first, first + 4)
  if found:
    return found.end()
  return first if len(data) - first >= 4 else len(data)
