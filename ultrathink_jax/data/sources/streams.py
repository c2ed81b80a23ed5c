"""The bytes of a file in large blocks, wherever it lies, unpacked where its name ends in .gz or .zst."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ultrathink_jax.data.sources.files import is_url, remote_errors
from ultrathink_jax.data.wording import in_short, printable
from ultrathink_jax.errors import DataError

BLOCK_BYTES = 4 * 1024 * 1024
_CODECS = {".gz": "gzip", ".zst": "zstd"}


def is_compressed(path: str) -> bool:
  return path.endswith(tuple(_CODECS))


@contextlib.contextmanager
def open_file(path: str) -> Iterator[Any]:
  """Opens a file as it lies there; it can seek."""
  if not is_url(path):
    with open(path, "rb") as file:
      yield file
    return
  import fsspec

  with fsspec.open(path, "rb") as file:
    yield file


def read_blocks(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
  """Yields the contents from `start` to `stop`, which only files that are not compressed take.

  Raises:
    DataError: the file cannot be read, or what is compressed is damaged or cut short.
  """
  try:
    with remote_errors(path) if is_url(path) else contextlib.nullcontext(), open_file(path) as file:
      if start:
        file.seek(start)
      stream = _unpacked(path, file) if is_compressed(path) else file
      left = None if stop is None else stop - start
      while block := stream.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
        left = None if left is None else left - len(block)
        yield block
  except (OSError, ValueError) as error:
    if isinstance(error, DataError):
      raise
    words = getattr(error, "strerror", None) or in_short(error)
    fix = "write it anew" if is_compressed(path) else "make it readable"
    raise DataError(f"{printable(path)} cannot be read: {words}; {fix} or leave it out") from error


def _unpacked(path: str, file: Any) -> Any:
  import pyarrow  # its streams read any number of members, hold one block, and say when a file is cut short

  codec = next(codec for suffix, codec in _CODECS.items() if path.endswith(suffix))
  return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec)
