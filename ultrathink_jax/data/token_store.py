"""Tokens on disk: shards of ArrayRecord records, one a document, with an index beside each and one manifest for all.

A shard N of a split lies in NNNNN.SPLIT.array_record and NNNNN.SPLIT.npy. Documents are read in the order of a hash of
their names, so that neither the number of shards nor who wrote them shows, and every prefix is a random sample.

A record is uint32 numbers: how many follow before the tokens, and if that is not 0, the label, then of each sequence
its length, the number of its runs and their lengths, of which the first is not learned, the second is, and so on. The
tokens of all sequences come after them, in the dtype of the store.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from ultrathink_jax.data.packing import Example
from ultrathink_jax.data.storage import read_manifest

SPLITS = ("train", "validation")
INDEX = np.dtype([("score", "<f8"), ("digest", "<u8"), ("length", "<i8")])
_LABELS = (None, False, True)
_ALL_LEARNED = np.zeros(1, "<u4").tobytes()  # no header: one sequence without a label


@dataclasses.dataclass(frozen=True)
class StoreInfo:
  """What the manifest of a store says.

  Attributes:
    key: hash of all that the store was asked to hold; a store is reused where it is the same.
    num_bytes: of the files that were read, about.
    fingerprint: of each split, a hash of its tokens and of the tokenizer that made them; the same on every machine.
    documents, tokens, text_bytes: of each split; bytes are those of UTF-8.
    gzip_bytes: size of `gzip -9` of the validation documents.
    left_out: how many documents each reason has kept out; each stands in rejects.jsonl.
    scrubbed: how many secrets of each kind were replaced.
    num_sequences: in a document: 1, or 2 for preferences.
    dtype: of tokens, little endian.
  """

  key: str
  source: str
  num_bytes: int
  tokenizer_fingerprint: str
  fingerprint: dict[str, str]
  documents: dict[str, int]
  tokens: dict[str, int]
  text_bytes: dict[str, int]
  gzip_bytes: int
  left_out: dict[str, int]
  scrubbed: dict[str, int]
  num_sequences: int
  shards: int
  dtype: str


class TokenStore:
  """The documents of a split of one or more stores, in one order, by random access from any thread."""

  def __init__(self, directories: Sequence[Path], infos: Sequence[StoreInfo], split: str):
    self.infos = tuple(infos)
    self.split = split
    self._files = [
      directory / f"{number:05}.{split}"
      for directory, info in zip(directories, infos, strict=True)
      for number in range(info.shards)
    ]
    parts = [np.load(f"{file}.npy", allow_pickle=False) for file in self._files]
    index = np.concatenate(parts) if parts else np.empty(0, INDEX)
    self._order = np.lexsort((index["digest"], index["score"]))
    self.lengths = index["length"][self._order]

  def __len__(self) -> int:
    return len(self._order)

  @property
  def name(self) -> str:
    """What the configuration calls the sources."""
    return ", ".join(info.source for info in self.infos)

  @property
  def num_tokens(self) -> int:
    return sum(info.tokens[self.split] for info in self.infos)

  @property
  def text_bytes(self) -> int:
    return sum(info.text_bytes[self.split] for info in self.infos)

  def example(self, index: int) -> Example:
    """Returns the only sequence of a document, or the first."""
    return self.sequences(index)[0]

  def sequences(self, index: int) -> tuple[Example, ...]:
    """Returns all sequences of a document: one, or the chosen and the rejected one."""
    return decode(self._records[int(self._order[index])], self.infos[0].dtype)[0]

  def label(self, index: int) -> bool | None:
    """Returns whether the document is labelled as good; None where it has no label."""
    return decode(self._records[int(self._order[index])], self.infos[0].dtype)[1]

  @functools.cached_property
  def _records(self) -> Any:
    from grain.sources import ArrayRecordDataSource

    return ArrayRecordDataSource([f"{file}.array_record" for file in self._files if _has_records(file)])


def open_info(directory: Path, key: str | None = None) -> StoreInfo | None:
  """Returns what the finished store at `directory` says, if it has this key where one is given, else None."""
  manifest = read_manifest(directory, key)
  return StoreInfo(**manifest) if manifest else None


def tokens_dtype(vocab_size: int) -> str:
  """Returns the smallest type that holds every token."""
  return "<u2" if vocab_size <= 2**16 else "<u4"


def encode(
  sequences: Sequence[Sequence[tuple[Integer[np.ndarray, "_"], bool]]], label: bool | None, dtype: str
) -> bytes:
  """Returns a record of sequences of (tokens, whether they are learned) parts."""
  tokens = b"".join(part.astype(dtype, copy=False).tobytes() for parts in sequences for part, _ in parts)
  if label is None and len(sequences) == 1 and all(is_learned for _, is_learned in sequences[0]):
    return _ALL_LEARNED + tokens
  header = [_LABELS.index(label)]
  for parts in sequences:
    runs = [0]  # the first one is not learned
    for part, is_learned in parts:
      if is_learned != (len(runs) % 2 == 0):
        runs.append(0)
      runs[-1] += len(part)
    header += [sum(runs), len(runs), *runs]
  return np.asarray([len(header), *header], "<u4").tobytes() + tokens


def decode(record: bytes, dtype: str) -> tuple[tuple[Example, ...], bool | None]:
  """Returns the sequences of a record, and its label."""
  size = int.from_bytes(record[:4], "little")
  tokens = np.frombuffer(record, dtype, offset=4 + 4 * size).astype(np.int32)
  if not size:
    return (Example(tokens, np.ones(len(tokens), bool)),), None
  header = np.frombuffer(record, "<u4", size, offset=4).tolist()
  sequences, at, start = [], 1, 0
  while at < size:
    length, num_runs = header[at : at + 2]
    runs = header[at + 2 : at + 2 + num_runs]
    is_learned = np.repeat(np.arange(num_runs) % 2 == 1, runs)
    sequences.append(Example(tokens[start : start + length], is_learned))
    at, start = at + 2 + num_runs, start + length
  return tuple(sequences), _LABELS[header[0]]


def fingerprint(index: np.ndarray, tokenizer_fingerprint: str) -> str:
  """Returns a hash of the documents of a split, in their order, and of the tokenizer."""
  ordered = index[np.lexsort((index["digest"], index["score"]))]
  digest = hashlib.sha256(tokenizer_fingerprint.encode())
  digest.update(np.ascontiguousarray(ordered["digest"]).tobytes())
  return digest.hexdigest()


def _has_records(file: Path) -> bool:
  return len(np.load(f"{file}.npy", mmap_mode="r", allow_pickle=False)) > 0
