"""The `text:PATH` source: one file, every file under a folder, or the files of a glob.

A file is one document, except that a file above 1 MiB, and a file that is the only one, is cut at blank lines into
documents of about 16 KiB, so that memory stays bounded and one file still gives both splits. The pieces of PATH are
named PATH#0, PATH#1 and so on and are split by these names.
"""

import codecs
import functools
import glob
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.config import DataConfig
from ultrathink_jax.data.documents import Corpus, Document, Splits, split
from ultrathink_jax.errors import ConfigError, DataError

_PIECE_BYTES = 16 * 1024
_MIN_PIECES = 20  # a small file that is the only one gives smaller pieces rather than fewer
_WHOLE_FILE_BYTES = 1024 * 1024
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_LINE_END = re.compile(rb"\n")
_CHARACTER = re.compile(rb"(?=[\x00-\x7f\xc0-\xff])")


class Span(NamedTuple):
  """A document as the bytes from `start` to `stop` of a file."""

  path: str
  name: str
  start: int
  stop: int


class TextDocuments:
  """Documents read from their files one at a time."""

  def __init__(self, spans: Sequence[Span]):
    self._spans = spans

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, index: int) -> Document:
    span = self._spans[index]
    with open(span.path, "rb") as file:
      file.seek(span.start)
      return Document(file.read(span.stop - span.start).decode(), span.name)


def text_corpus(
  argument: str, config: DataConfig, vocab_size: int, directory: Path, log: Callable[[str], None]
) -> Corpus:
  """Returns the text files that `argument` names.

  Raises:
    DataError: there are none.
  """
  del vocab_size, directory
  if not argument:
    raise ConfigError(f"data.source={config.source!r} lacks a path; write text:PATH, a file, a folder or a glob")
  files = find_files(argument)
  if not files:
    raise DataError(f"data.source={config.source!r} names no file; check that {argument} exists and holds text files")
  return Corpus(identify(files), functools.partial(_open, files, config, log))


def find_files(argument: str) -> dict[str, Path]:
  """Returns {name: path} of the files at `argument`, sorted; names are relative to what the files have in common."""
  path = Path(argument).expanduser()
  if path.is_file():
    return {path.name: path}
  if path.is_dir():
    return walk(path, lambda name: name.startswith("."))
  paths = [Path(p) for p in sorted(glob.glob(os.path.expanduser(argument), recursive=True)) if os.path.isfile(p)]
  if not paths:
    return {}
  root = os.path.commonpath([p.parent for p in paths])
  return {p.relative_to(root).as_posix(): p for p in paths}


def walk(root: Path, is_skipped: Callable[[str], bool]) -> dict[str, Path]:
  """Returns {path relative to root: path} of all files below, sorted; skipped names are not entered or listed."""
  files = {}
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if not is_skipped(name)]
    for name in names:
      path = Path(folder, name)
      if not is_skipped(name) and path.is_file():
        files[path.relative_to(root).as_posix()] = path
  return dict(sorted(files.items()))


def identify(files: dict[str, Path]) -> str:
  """Returns a hash of the names, sizes and modification times."""
  digest = hashlib.sha256()
  for name, path in files.items():
    status = path.stat()
    digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
  return digest.hexdigest()


def is_text(path: Path) -> bool:
  """Returns whether the whole file is UTF-8."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  try:
    with open(path, "rb") as file:
      while block := file.read(1 << 20):
        decoder.decode(block)
    decoder.decode(b"", final=True)
  except UnicodeDecodeError:
    return False
  except OSError as error:
    raise DataError(f"{path} cannot be read: {error.strerror}; make it readable or leave it out") from error
  return True


def cut(path: Path, piece_bytes: int) -> list[int]:
  """Returns the offsets of the pieces of a UTF-8 file and its size: after blank lines, else lines, else characters.

  A piece has at least `piece_bytes` bytes, except the last, and at most five times as many.
  """
  offsets = [0]
  with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    while len(data) - offsets[-1] > piece_bytes:
      start, stop = offsets[-1] + piece_bytes, offsets[-1] + 5 * piece_bytes - 4
      found = _BLANK_LINE.search(data, start - 1, stop) or _LINE_END.search(data, start - 1, stop)
      found = found or _CHARACTER.search(data, start)
      offsets.append(found.end() if found else len(data))
    if offsets[-1] < len(data):
      offsets.append(len(data))
  return offsets


def _open(files: dict[str, Path], config: DataConfig, log: Callable[[str], None]) -> Splits:
  texts = {name: path for name, path in files.items() if is_text(path)}
  skipped = [name for name in files if name not in texts]
  if skipped:
    log(f"data: skipped {len(skipped)} of {len(files)} files that are not UTF-8 text, the first is {skipped[0]}")
  texts = {name: path for name, path in texts.items() if path.stat().st_size}
  spans = []
  for name, path in texts.items():
    size = path.stat().st_size
    offsets = [0, size]
    if len(texts) == 1:
      offsets = cut(path, max(1, min(_PIECE_BYTES, size // _MIN_PIECES)))
    elif size > _WHOLE_FILE_BYTES:
      offsets = cut(path, _PIECE_BYTES)
    names = [name] if len(offsets) == 2 else [f"{name}#{i}" for i in range(len(offsets) - 1)]
    spans += [Span(str(path), *span) for span in zip(names, offsets, offsets[1:], strict=False)]
  if not spans:
    raise DataError(
      f"data.source={config.source!r} holds no text: {len(files)} files, {len(skipped)} of them not UTF-8"
    )
  train, validation = split([span.name for span in spans], config.validation_fraction)
  return Splits(TextDocuments([spans[i] for i in train]), TextDocuments([spans[i] for i in validation]), len(skipped))
