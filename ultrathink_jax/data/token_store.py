"""A split as tokens on disk: one ArrayRecord record per document, its lengths, and a manifest."""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ultrathink_jax.data.documents import Source
from ultrathink_jax.data.storage import read_manifest, write_directory
from ultrathink_jax.data.tokenizer import Tokenizer

_FORMAT = 1  # raise when the files of a store or the order of documents change
_RECORDS = "tokens.array_record"
_LENGTHS = "lengths.npy"
_CHUNK_CHARS = 4_000_000


@dataclasses.dataclass(frozen=True)
class StoreInfo:
  """What a store says about itself.

  Attributes:
    key: hash of all that the store was asked to hold; a store is reused where it is the same.
    fingerprint: hash of the tokens it holds and of the tokenizer that made them; the same on every machine.
    text_bytes: UTF-8 bytes of all documents.
    gzip_bytes: size of `gzip -9` of all documents in a row; measured for the validation split, else None.
    dtype: of the tokens of a record, little endian.
  """

  key: str
  source: str
  split: str
  tokenizer_fingerprint: str
  documents: int
  tokens: int
  text_bytes: int
  skipped_files: int
  gzip_bytes: int | None
  dtype: str
  fingerprint: str


class TokenStore:
  """The documents of a split as tokens, by random access from any thread."""

  def __init__(self, directory: Path, info: StoreInfo):
    self._directory = directory
    self.info = info
    self.lengths = np.load(directory / _LENGTHS, allow_pickle=False)

  def __len__(self) -> int:
    return self.info.documents

  def __getitem__(self, index: int) -> np.ndarray:
    """Returns the tokens of a document, int32, without BOS and EOS."""
    return np.frombuffer(self._records[index], self.info.dtype).astype(np.int32)

  @functools.cached_property
  def _records(self) -> Any:
    from grain.sources import ArrayRecordDataSource

    return ArrayRecordDataSource(str(self._directory / _RECORDS))


def store_key(source: str, identity: str, split: str, validation_fraction: float, tokenizer: Tokenizer) -> str:
  """Returns the hash of all that decides what a store holds."""
  parts = [_FORMAT, source, identity, split, validation_fraction, tokenizer.fingerprint]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_store(directory: Path, key: str | None = None) -> TokenStore | None:
  """Returns the finished store at `directory`, with this key if one is given, else None."""
  manifest = read_manifest(directory, key)
  return TokenStore(directory, StoreInfo(**manifest)) if manifest else None


def write_store(
  directory: Path, key: str, source_name: str, split: str, documents: Source, num_skipped: int, tokenizer: Tokenizer
) -> TokenStore:
  """Tokenizes every document into a new store that replaces what stood at `directory`."""

  def write(path: Path) -> dict[str, Any]:
    counts = _write_records(path, documents, tokenizer, measure_gzip=split == "validation")
    return {
      "source": source_name,
      "split": split,
      "tokenizer_fingerprint": tokenizer.fingerprint,
      "documents": len(documents),
      "skipped_files": num_skipped,
      **counts,
    }

  return TokenStore(directory, StoreInfo(**write_directory(directory, key, write)))


def _write_records(directory: Path, documents: Source, tokenizer: Tokenizer, measure_gzip: bool) -> dict[str, Any]:
  from array_record.python.array_record_module import ArrayRecordWriter

  dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
  lengths, text_bytes, gzip_bytes = [], 0, 0
  compressor = zlib.compressobj(9, wbits=31)
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  writer = ArrayRecordWriter(str(directory / _RECORDS), "group_size:1")
  try:
    for texts in _chunks(documents):
      for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        record = np.asarray(ids, dtype).tobytes()
        writer.write(record)
        digest.update(len(ids).to_bytes(8, "little") + record)
        lengths.append(len(ids))
        encoded = text.encode()
        text_bytes += len(encoded)
        if measure_gzip:
          gzip_bytes += len(compressor.compress(encoded))
  finally:
    writer.close()
  np.save(directory / _LENGTHS, np.asarray(lengths, np.int64), allow_pickle=False)
  return {
    "tokens": sum(lengths),
    "text_bytes": text_bytes,
    "gzip_bytes": gzip_bytes + len(compressor.flush()) if measure_gzip else None,
    "dtype": dtype,
    "fingerprint": digest.hexdigest(),
  }


def _chunks(documents: Source) -> Iterator[list[str]]:
  texts, size = [], 0
  for index in range(len(documents)):
    text = documents[index].text
    texts.append(text)
    size += len(text)
    if size >= _CHUNK_CHARS:
      yield texts
      texts, size = [], 0
  if texts:
    yield texts
