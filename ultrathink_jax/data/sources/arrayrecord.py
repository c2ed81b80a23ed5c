"""The `arrayrecord:PATH` source: records that are JSON objects or texts, named FILE#RECORD from 0.

A file whose first record is a JSON object holds objects, and any other record is rejected; else every record is a
UTF-8 text. What TensorFlow Datasets has written is read by `tfds:DIR`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.data.documents import BadRecordError, Corpus, Record, Reject, Shard, excerpt
from ultrathink_jax.data.sources.files import File, Found, find_files, is_url
from ultrathink_jax.data.sources.json_objects import parse_object
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.wording import in_short, printable
from ultrathink_jax.errors import DataError

_SUFFIXES = r"\.(array_?record|arecord)(-\d+-of-\d+)?$"
_SHARD_BYTES = 32 * 1024 * 1024
_BATCH_BYTES = 4 * 1024 * 1024
_MAX_BATCH = 1024
_READ_IN_ORDER = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecordShard(NamedTuple):
  """Some records of a file."""

  name: str
  num_bytes: int
  file: str
  path: str
  indices: range
  text_field: str
  max_bytes: int

  def read(self) -> Iterator[Record | Reject]:
    batch = max(1, min(_MAX_BATCH, _BATCH_BYTES * len(self.indices) // max(self.num_bytes, 1)))
    with _opened(self.path) as reader:
      has_objects = _is_object(reader.read([0])[0])
      for start in range(self.indices.start, self.indices.stop, batch):
        stop = min(start + batch, self.indices.stop)
        for index, content in zip(range(start, stop), reader.read(start, stop), strict=True):
          yield self._entry(f"{self.file}#{index}", content, has_objects)

  def _entry(self, where: str, content: bytes, is_object: bool) -> Record | Reject:
    if len(content) > self.max_bytes:
      return Reject(where, f"is longer than {self.max_bytes:,} bytes", excerpt(content))
    try:
      return Record(where, parse_object(content) if is_object else {self.text_field: content.decode()})
    except BadRecordError as error:
      return Reject(where, str(error), excerpt(content))
    except UnicodeDecodeError as error:
      wrong = f"is not UTF-8 text: byte 0x{content[error.start]:02x} at position {error.start}"
      return Reject(where, wrong, excerpt(content))


def arrayrecord_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the ArrayRecord files that `argument` names."""
  del directory
  found = find_files(argument, "arrayrecord", log, _SUFFIXES)
  identity = found.identity("arrayrecord", options.text_field, options.max_record_bytes)
  return Corpus(identity, functools.partial(_open, found, options))


def _open(found: Found, options: SourceOptions) -> dict[str, Sequence[Shard]]:
  return {"": [*found.refused, *(shard for file in found.files for shard in _shards(file, options))]}


def _shards(file: File, options: SourceOptions) -> list[Shard]:
  with _opened(file.path) as reader:
    num_records = reader.num_records()
  size = max(file.size, 0)
  step = max(1, num_records // max(1, size // _SHARD_BYTES))
  return [
    ArrayRecordShard(
      f"{file.name}#{start}",
      size * min(step, num_records - start) // num_records,
      file.name,
      file.path,
      range(start, min(start + step, num_records)),
      options.text_field,
      options.max_record_bytes,
    )
    for start in range(0, num_records, step)
  ]


def _is_object(content: bytes) -> bool:
  try:
    parse_object(content)
  except BadRecordError:
    return False
  return True


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
  """Opens an ArrayRecord file. Raises DataError for what is wrong with it, then or while it is read."""
  from array_record.python.array_record_module import ArrayRecordReader

  if is_url(path) and not path.startswith("gs://"):
    raise DataError(f"{printable(path)} cannot be read: ArrayRecord files lie on a disk or gs://; copy them to a disk")
  try:
    if not is_url(path):
      with open(path, "rb"):  # says why where it cannot be opened
        pass
    reader = ArrayRecordReader(path, options=_READ_IN_ORDER)
    try:
      yield reader
    finally:
      reader.close()
  except OSError as error:
    raise DataError(f"{printable(path)} cannot be read: {error.strerror}; make it readable or leave it out") from error
  except (ValueError, RuntimeError, IndexError) as error:
    if isinstance(error, DataError):
      raise
    words = in_short(error) if str(error) else "it is cut short or damaged"
    raise DataError(f"{printable(path)} is no readable ArrayRecord file: {words}; write it anew") from error
