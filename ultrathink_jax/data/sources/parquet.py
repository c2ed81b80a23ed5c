"""The `parquet:PATH` source: every row is an entry, named FILE#ROW from 0; shards are row groups."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.data.documents import Corpus, Record, Reject, Shard
from ultrathink_jax.data.sources.files import File, Found, find_files, is_url, remote_errors
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.sources.streams import open_file
from ultrathink_jax.data.wording import in_short, printable, quote
from ultrathink_jax.errors import DataError

_SUFFIXES = r"\.(parquet|pq)$"
_SHARD_BYTES = 32 * 1024 * 1024
_BATCH_BYTES = 4 * 1024 * 1024
_MAX_BATCH_ROWS = 256  # few, as the sizes in a file need not be true
_BUFFER_BYTES = 1024 * 1024


class ParquetShard(NamedTuple):
  """Row groups `groups` of a file; the first of their rows has the number `first_row`."""

  name: str
  num_bytes: int
  file: str
  path: str
  groups: range
  first_row: int
  batch_rows: int
  max_bytes: int

  def read(self) -> Iterator[Record | Reject]:
    with _opened(self.path) as file:
      row = self.first_row
      for batch in file.iter_batches(self.batch_rows, list(self.groups), use_threads=False):
        for fields in _rows(batch, self.max_bytes):
          where = f"{self.file}#{row}"
          yield Reject(where, fields) if isinstance(fields, str) else Record(where, fields)
          row += 1


def parquet_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the Parquet files that `argument` names."""
  del directory
  found = find_files(argument, "parquet", log, _SUFFIXES)
  identity = found.identity("parquet", options.max_record_bytes)
  return Corpus(identity, functools.partial(_open, found, options.max_record_bytes))


def _open(found: Found, max_bytes: int) -> dict[str, Sequence[Shard]]:
  return {"": [*found.refused, *(shard for file in found.files for shard in _shards(file, max_bytes))]}


def _shards(file: File, max_bytes: int) -> list[Shard]:
  with _opened(file.path) as opened:
    names = opened.schema_arrow.names
    if len(set(names)) < len(names):
      twice = next(name for name in names if names.count(name) > 1)
      raise DataError(f"{printable(file.path)} has the column {quote(twice)} twice; write it anew without")
    groups = [opened.metadata.row_group(index) for index in range(opened.metadata.num_row_groups)]
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
  shards: list[Shard] = []
  start = first_row = rows = num_bytes = 0
  for index, (group_rows, group_bytes) in enumerate(sizes):
    rows, num_bytes = rows + group_rows, num_bytes + max(group_bytes, 0)
    if num_bytes >= _SHARD_BYTES or index == len(sizes) - 1:
      batch_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * rows // max(num_bytes, 1)))
      part = range(start, index + 1), first_row, batch_rows, max_bytes
      shards.append(ParquetShard(f"{file.name}#{first_row}", num_bytes, file.name, file.path, *part))
      start, first_row, rows, num_bytes = index + 1, first_row + rows, 0, 0
  return shards


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
  """Opens a Parquet file. Raises DataError for what is wrong with it, then or while it is read."""
  import pyarrow
  from pyarrow import parquet

  try:
    with (
      remote_errors(path) if is_url(path) else contextlib.nullcontext(),
      open_file(path) as file,
      parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as opened,
    ):
      yield opened
  except (OSError, pyarrow.ArrowException) as error:
    if getattr(error, "strerror", None):
      raise DataError(
        f"{printable(path)} cannot be read: {error.strerror}; make it readable or leave it out"
      ) from error
    raise DataError(f"{printable(path)} is no readable Parquet file: {in_short(error)}; write it anew") from error


def _rows(batch: Any, max_bytes: int) -> list[dict[str, Any] | str]:
  """Returns the fields of each row, or why it has none."""
  if batch.nbytes <= max_bytes:
    with contextlib.suppress(UnicodeDecodeError):
      return batch.to_pylist()
  return [_row(batch.slice(index, 1), max_bytes) for index in range(batch.num_rows)]


def _row(batch: Any, max_bytes: int) -> dict[str, Any] | str:
  if batch.nbytes > max_bytes:
    return f"is longer than {max_bytes:,} bytes"
  try:
    return batch.to_pylist()[0]
  except UnicodeDecodeError as error:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"
