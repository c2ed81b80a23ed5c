"""The `code:PATH` source: samples of a source tree, built on first use."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.data.code.build import Builder
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.code.tokens import TokenizerView
from ultrathink_jax.data.documents import Corpus, Record, Reject, Shard, excerpt
from ultrathink_jax.data.storage import read_manifest, write_directory
from ultrathink_jax.errors import ConfigError, DataError

_SHARD_BYTES = 16 * 1024 * 1024
_READ_SPLITS = ("train", "validation")  # the test split is for evaluation


class CodeShard(NamedTuple):
  """The samples whose lines begin at byte `start` of a file or later, before byte `stop`."""

  path: Path
  name: str
  start: int
  stop: int

  @property
  def num_bytes(self) -> int:
    return self.stop - self.start

  def read(self) -> Iterator[Record | Reject]:
    try:
      with open(self.path, "rb") as file:
        if self.start:
          file.seek(self.start - 1)
          file.readline()  # the line before, of which the shard before has the start
        while file.tell() < self.stop and (line := file.readline()):
          yield _read(self.name, line)
    except OSError as error:
      raise DataError(f"{self.path} cannot be read: {error.strerror}; remove its folder to build it again") from error


def code_corpus(
  argument: str,
  options: CodeOptions,
  directory: Path,
  log: Callable[[str], None],
  tokenizer: TokenizerView | None = None,
) -> Corpus:
  """Returns the samples of the source tree at `argument`, built below `directory` when they are read first.

  Nothing below `directory` is part of the tree.

  Raises:
    ConfigError: there is no path.
    DataError: it is no folder.
  """
  if not argument:
    raise ConfigError("data.source='code:' lacks a path; write code:PATH, the root of a source tree")
  root = Path(argument).expanduser().resolve()
  directory = directory.resolve()
  builder = Builder(root, options, tokenizer, log, [directory])
  identity = builder.identity()
  folder = directory / f"code-{hashlib.sha256(str(root).encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
  return Corpus(identity, functools.partial(_open, builder, folder, identity))


def _open(builder: Builder, folder: Path, identity: str) -> Mapping[str, Sequence[Shard]]:
  if read_manifest(folder, identity) is None:
    write_directory(folder, identity, builder.write)
  return {split: _shards(folder / f"{split}.jsonl") for split in _READ_SPLITS}


def _shards(path: Path) -> list[CodeShard]:
  size = path.stat().st_size
  return [
    CodeShard(path, f"{path.name}#{i}", start, min(start + _SHARD_BYTES, size))
    for i, start in enumerate(range(0, size, _SHARD_BYTES))
  ]


def _read(name: str, line: bytes) -> Record | Reject:
  try:
    fields = json.loads(line)
    meta = fields["meta"]
    start, stop = meta["span"]
    where = f"{meta['path']}#{meta['kind']}:{start}-{stop}:{meta['name']}"
    return Record(where, fields)
  except (ValueError, KeyError, TypeError) as error:
    return Reject(name, f"the line is no sample: {error}", excerpt(line))
