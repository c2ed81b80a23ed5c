"""Tokenizers: text to token numbers and back, exactly."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, SupportsIndex, runtime_checkable

from ultrathink_jax.data.json_tokenizer import JSON_FILE, SETTINGS_FILE, JsonTokenizer, read_json
from ultrathink_jax.data.sentence_piece import MODEL_FILE, SENTENCEPIECE_KEY, SentencePieceTokenizer
from ultrathink_jax.errors import ConfigError, DataError

NUM_NUMBERS_SPECIAL = 2  # BOS and EOS of the numbers tokenizer, whose ordinary tokens follow


@runtime_checkable
class Tokenizer(Protocol):
  """Text to tokens and back; `decode(encode(text)) == text`, and `encode` adds neither BOS nor EOS."""

  vocab_size: int
  bos_id: int
  eos_id: int
  fingerprint: str  # sha256 of what defines the tokenizer

  def encode(self, text: str) -> list[int]: ...

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

  def decode(self, ids: Iterable[SupportsIndex]) -> str: ...

  def save(self, directory: Path) -> None: ...


class NumbersTokenizer:
  """Text of decimal token numbers separated by spaces, for the synthetic source; 0 is BOS and 1 is EOS."""

  bos_id = 0
  eos_id = 1

  def __init__(self, vocab_size: int):
    if vocab_size <= NUM_NUMBERS_SPECIAL:
      raise ConfigError(f"model.vocab_size={vocab_size} leaves no numbers beside BOS and EOS; choose 3 or more")
    self.vocab_size = vocab_size
    self.fingerprint = hashlib.sha256(f"numbers {vocab_size}".encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    try:
      ids = [int(word) for word in text.split()]
    except ValueError:
      ids = [-1]
    if ids and not NUM_NUMBERS_SPECIAL <= min(ids) <= max(ids) < self.vocab_size:
      raise DataError(
        f"the numbers tokenizer cannot read {text[:40]!r}; "
        f"it takes numbers from {NUM_NUMBERS_SPECIAL} to {self.vocab_size - 1} separated by spaces"
      )
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return " ".join(str(i) for i in map(int, ids) if i >= NUM_NUMBERS_SPECIAL)

  def save(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / JSON_FILE).write_text(json.dumps({"numbers": self.vocab_size}) + "\n")


class BytesTokenizer:
  """The bytes of UTF-8 as tokens 0 to 255, then BOS and EOS; nothing is trained and nothing is unknown."""

  vocab_size = 258
  bos_id = 256
  eos_id = 257
  fingerprint = hashlib.sha256(b"bytes").hexdigest()

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return bytes(i for i in map(int, ids) if i < self.bos_id).decode(errors="replace")

  def save(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / JSON_FILE).write_text(json.dumps({"bytes": self.vocab_size}) + "\n")


def load_tokenizer(path: Path | str) -> Tokenizer:
  """Returns the tokenizer saved in a directory, or that of a tokenizer.json or SentencePiece .model file.

  Raises:
    DataError: there is none.
  """
  path = Path(path).expanduser()
  if path.suffix == ".json":
    return JsonTokenizer(path)
  model = path
  if path.is_dir():
    in_json, model = path / JSON_FILE, path / MODEL_FILE
    stands_for_model = model.is_file() and SENTENCEPIECE_KEY in read_json(path / SETTINGS_FILE)
    if in_json.is_file() and not stands_for_model:
      saved = read_json(in_json)
      if "bytes" in saved:
        return BytesTokenizer()
      return NumbersTokenizer(saved["numbers"]) if "numbers" in saved else JsonTokenizer(in_json)
  try:
    return SentencePieceTokenizer(model.read_bytes(), str(model))
  except OSError as error:
    raise DataError(
      f"tokenizer {model} cannot be read: {error.strerror}; give the path of a .model file or of a tokenizer.json"
    ) from error
