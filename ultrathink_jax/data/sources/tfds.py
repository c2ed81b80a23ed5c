"""The `tfds:DIR` source: a data set that TensorFlow Datasets has prepared, read without TensorFlow.

DIR is the folder that holds dataset_info.json, or one above with exactly one such folder below. Entries are named
SPLIT#INDEX from 0. Where the data set has a validation split, its own splits are used; else all but `test` is split by
the names of the documents.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ultrathink_jax.data.documents import Corpus, Record, Reject, Shard
from ultrathink_jax.data.sources.files import find_files, remote_errors
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.wording import in_short, printable
from ultrathink_jax.errors import ConfigError, DataError

_INFO = "dataset_info.json"
_DEPTH = 3  # of NAME/CONFIG/VERSION below a folder of data sets
_SHARD_BYTES = 32 * 1024 * 1024
_BATCH = 64


class TfdsShard(NamedTuple):
  """Some examples of a split."""

  directory: str
  split: str
  indices: range
  num_bytes: int

  @property
  def name(self) -> str:
    return f"{self.split}#{self.indices.start}"

  def read(self) -> Iterator[Record | Reject]:
    with _errors(self.directory):
      source = _builder(self.directory).as_data_source(self.split)
      for start in range(self.indices.start, self.indices.stop, _BATCH):
        batch = range(start, min(start + _BATCH, self.indices.stop))
        for index, features in zip(batch, source.__getitems__(batch), strict=True):
          yield Record(f"{self.split}#{index}", {name: plain_value(value) for name, value in features.items()})


def tfds_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the prepared data set that `argument` names."""
  del options, directory
  if not argument:
    raise ConfigError("source 'tfds:' lacks a path; write tfds:DIR, a folder with dataset_info.json in or below it")
  version = find_version(argument)
  return open_prepared(version, find_files(version, "tfds", log).identity("tfds"))


def open_prepared(version: str, identity: str) -> Corpus:
  """Returns the data set whose folder is `version`."""
  return Corpus(identity, functools.partial(_open, version))


def find_version(argument: str) -> str:
  """Returns the folder of the one data set at or below a folder. Raises DataError."""
  with remote_errors(argument):
    from etils import epath

    level = [epath.Path(argument).expanduser()]
    if not level[0].is_dir():
      raise DataError(f"{printable(argument)} is no folder; name the one that tfds has prepared")
    for _ in range(_DEPTH + 1):
      found = sorted(str(folder) for folder in level if (folder / _INFO).exists())
      if len(found) == 1:
        return found[0]
      if found:
        choices = ", ".join(map(printable, found[:5]))
        raise DataError(f"{printable(argument)} holds {len(found)} prepared data sets; name one, as {choices}")
      level = [child for folder in level for child in folder.iterdir() if _may_hold(child)]
    raise DataError(f"{printable(argument)} holds no {_INFO}; name a folder that tfds has prepared")


def _may_hold(child: Any) -> bool:
  return not child.name.startswith((".", "incomplete.", "downloads")) and child.is_dir()


def _open(version: str) -> Mapping[str, Sequence[Shard]]:
  with _errors(version):
    splits = _builder(version).info.splits
    shards = {name: _shards(version, name, info.num_examples, info.num_bytes) for name, info in splits.items()}
  return own_splits(shards)


def own_splits(shards: dict[str, list[Shard]]) -> dict[str, list[Shard]]:
  """Returns shards under the names of their splits if one is for validation, else all but those for tests under ""."""
  if "train" in shards and "validation" in shards:
    return shards
  tests = {name: parts for name, parts in shards.items() if name == "test" and len(shards) > 1}
  return {"": [shard for name, parts in shards.items() if name not in tests for shard in parts], **tests}


def _shards(version: str, split: str, num_examples: int, num_bytes: int) -> list[Shard]:
  step = max(1, num_examples // max(1, num_bytes // _SHARD_BYTES))
  starts = range(0, num_examples, step)
  indices = [range(start, min(start + step, num_examples)) for start in starts]
  return [TfdsShard(version, split, part, num_bytes * len(part) // num_examples) for part in indices]


def _builder(version: str) -> Any:
  import tensorflow_datasets

  return tensorflow_datasets.builder_from_directory(version)


@contextlib.contextmanager
def _errors(version: str) -> Iterator[None]:
  """Turns what goes wrong in TFDS, which raises errors of many libraries, into a DataError."""
  try:
    yield
  except DataError:
    raise
  except NotImplementedError as error:
    fix = "prepare it with --file_format=array_record"
    raise DataError(f"{printable(version)} is in a format without random access; {fix}") from error
  except Exception as error:
    raise DataError(f"{printable(version)} is no readable data set: {in_short(error)}; prepare it anew") from error


def plain_value(value: Any) -> Any:
  """Returns a feature as JSON would hold it: bytes that are UTF-8 become text, arrays lists."""
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return value
  if isinstance(value, np.ndarray):
    return [plain_value(item) for item in value.tolist()] if value.ndim else plain_value(value.item())
  if isinstance(value, np.generic):
    return plain_value(value.item())
  if isinstance(value, Mapping):
    return {name: plain_value(item) for name, item in value.items()}
  return [plain_value(item) for item in value] if isinstance(value, (list, tuple)) else value
