"""Writes one shard of a token store: records, their index, and what was left out."""

import collections
import concurrent.futures
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ultrathink_jax.data.documents import Document, Reject, excerpt, score
from ultrathink_jax.data.token_store import INDEX, SPLITS, encode, tokens_dtype
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.errors import DataError

_CHUNK_CHARS = 4_000_000  # tokenized at once
_NUM_THREADS = 2  # one makes lists of numbers, as libraries return them, while they work for the other
_PIECE_CHARS = 256 * 1024  # of a text that are tokenized at once: SentencePiece takes 50 bytes for each, and more time
_MAX_REASONS = 100
_MAX_NAME_CHARS = 70  # of an entry, in the one line that ends a strict run
_MAX_ERROR_CHARS = 150  # of that line before it says what to do

_Encoded = np.ndarray | DataError
_RECORDS = "group_size:1,uncompressed"  # read one by one, in half the time


class Kept(NamedTuple):
  """A document that is to be learned: what of it was replaced as secret, by kind, and what tells its duplicates."""

  document: Document
  num_scrubbed: collections.Counter[str]
  signature: bytes


class _Chunk(NamedTuple):
  """Documents, each with its split, and the tokens of the texts in them."""

  documents: list[tuple[str, Document]]
  encoded: concurrent.futures.Future[list[_Encoded]]


class ShardWriter:
  """Writes the documents of one task, shard `number` of each split, and what was left out.

  Threads tokenize while the documents that follow are read and those before are written. A document that the tokenizer
  cannot read is left out as others are, or ends the task with a DataError if `is_strict`.
  """

  def __init__(self, directory: Path, number: int, tokenizer: Tokenizer, is_strict: bool):
    from array_record.python.array_record_module import ArrayRecordWriter

    self._file = lambda split: directory / f"{number:05}.{split}"
    self._tokenizer = tokenizer
    self._is_strict = is_strict
    self._dtype = tokens_dtype(tokenizer.vocab_size)
    self._records = {split: ArrayRecordWriter(f"{self._file(split)}.array_record", _RECORDS) for split in SPLITS}
    self._rejects = open(directory / f"{number:05}.rejects.jsonl", "w", encoding="utf-8")  # noqa: SIM115, see close
    self._index: dict[str, list[tuple[float, int, int]]] = {split: [] for split in SPLITS}
    self._threads = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)
    self._waiting: list[tuple[str, Document]] = []
    self._num_waiting_chars = 0
    self._in_work: collections.deque[_Chunk] = collections.deque()
    self._tokens = dict.fromkeys(SPLITS, 0)
    self._text_bytes = dict.fromkeys(SPLITS, 0)
    self._compressor = zlib.compressobj(9, wbits=31)
    self._gzip_bytes = 0
    self._left_out: collections.Counter[str] = collections.Counter()
    self._scrubbed: collections.Counter[str] = collections.Counter()
    self._num_sequences: set[int] = set()

  def add(self, split: str, kept: Kept) -> None:
    document = kept.document
    self._scrubbed += kept.num_scrubbed
    self._waiting.append((split, document))
    self._num_waiting_chars += sum(len(part.text) for parts in document.sequences for part in parts)
    if self._num_waiting_chars >= _CHUNK_CHARS:
      self._begin_waiting()

  def reject(self, entry: Reject) -> None:
    kind = entry.reason.partition(":")[0]  # what follows is about this entry alone
    self._left_out[kind if kind in self._left_out or len(self._left_out) < _MAX_REASONS else "other"] += 1
    self._rejects.write(json.dumps(entry._asdict()) + "\n")

  def finish(self) -> dict[str, Any]:
    """Returns the counts, after everything is written."""
    self._begin_waiting()
    while self._in_work:
      self._end_first()
    self.close()
    for split, entries in self._index.items():
      np.save(f"{self._file(split)}.npy", np.array(entries, INDEX), allow_pickle=False)
    return {
      "documents": {split: len(entries) for split, entries in self._index.items()},
      "tokens": self._tokens,
      "text_bytes": self._text_bytes,
      "gzip_bytes": self._gzip_bytes + len(self._compressor.flush()) if self._text_bytes[SPLITS[1]] else 0,
      "left_out": dict(self._left_out),
      "scrubbed": dict(self._scrubbed),
      "num_sequences": sorted(self._num_sequences),
    }

  def close(self) -> None:
    self._threads.shutdown(cancel_futures=True)
    for writer in self._records.values():
      if writer.is_open():
        writer.close()
    self._rejects.close()

  def _begin_waiting(self) -> None:
    """Has the documents that wait tokenized, and writes those that were to be tokenized before them."""
    documents, size = self._waiting, self._num_waiting_chars
    self._waiting, self._num_waiting_chars = [], 0
    texts = [part.text for _, document in documents for parts in document.sequences for part in parts]
    encoded = self._threads.submit(tokenize, self._tokenizer, texts, self._dtype)
    self._in_work.append(_Chunk(documents, encoded))
    num_left = _NUM_THREADS if size <= 2 * _CHUNK_CHARS else 0  # a very long document is held by itself
    while len(self._in_work) > num_left:
      self._end_first()

  def _end_first(self) -> None:
    """Writes the documents that were the first to be tokenized."""
    chunk = self._in_work.popleft()
    documents, encoded = chunk.documents, iter(chunk.encoded.result())
    for split, document in documents:
      sequences = [[(next(encoded), part.is_learned) for part in parts] for parts in document.sequences]
      unreadable = next((tokens for parts in sequences for tokens, _ in parts if isinstance(tokens, DataError)), None)
      if unreadable is not None:
        entry = Reject(document.name, str(unreadable), excerpt(document.text))
        if self._is_strict:
          raise bad_entry(entry) from unreadable
        self.reject(entry)
        continue
      record = encode(sequences, document.label, self._dtype)
      self._records[split].write(record)
      digest = int.from_bytes(hashlib.blake2b(record, digest_size=8).digest(), "little")
      self._index[split].append((score(document.name), digest, sum(len(tokens) for tokens, _ in sequences[0])))
      self._tokens[split] += sum(len(tokens) for parts in sequences for tokens, _ in parts)
      self._num_sequences.add(len(sequences))
      for parts in document.sequences:
        for part in parts:
          content = part.text.encode()
          self._text_bytes[split] += len(content)
          if split == SPLITS[1]:
            self._gzip_bytes += len(self._compressor.compress(content))


def bad_entry(entry: Reject) -> DataError:
  """Returns what ends a strict run; not over 200 characters."""
  where = entry.where if len(entry.where) <= _MAX_NAME_CHARS else f"...{entry.where[-_MAX_NAME_CHARS:]}"
  return DataError(f"{where}: {entry.reason}"[:_MAX_ERROR_CHARS] + "; data.on_error=skip leaves such entries out")


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], dtype: str) -> list[_Encoded]:
  """Returns the tokens of each text, or why it has none; a long one goes in pieces, so that memory stays bounded."""
  pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text)]
  parts: list[list[np.ndarray]] = [[] for _ in texts]
  errors: dict[int, DataError] = {}
  start = size = 0
  for stop, (_, piece) in enumerate(pieces, 1):
    size += len(piece)
    if size >= _CHUNK_CHARS or stop == len(pieces):
      batch = pieces[start:stop]
      for (number, _), encoded in zip(batch, _encode_batch(tokenizer, [piece for _, piece in batch]), strict=True):
        if isinstance(encoded, DataError):
          errors[number] = encoded
        else:
          parts[number].append(np.array(encoded, dtype))
      start, size = stop, 0
  joined = lambda part: part[0] if len(part) == 1 else np.concatenate(part)
  return [errors[number] if number in errors else joined(part) for number, part in enumerate(parts)]


def _encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int] | DataError]:
  try:
    return tokenizer.encode_batch(texts)
  except DataError as error:  # of one text; the others are read without it
    if len(texts) == 1:
      return [error]
    return [encoded for text in texts for encoded in _encode_batch(tokenizer, [text])]


def _pieces(text: str) -> Iterator[str]:
  """Yields a text in pieces that end, where they can, behind a line."""
  start = 0
  while len(text) - start > _PIECE_CHARS:
    stop = text.rfind("\n", start + _PIECE_CHARS // 2, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
    yield text[start:stop]
    start = stop
  yield text[start:] if start else text
