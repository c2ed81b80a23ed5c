"""Tokenizers: text to token numbers and back, exactly.

The trained tokenizer is byte-pair encoding by SentencePiece with byte fallback and without any normalisation. Pieces
may cross spaces and line ends: "):\\n        return" costs two or three tokens, and 4096 tokens reach 4.2 bytes per
token on Python source, where pieces that stop at spaces reach 3.3 (a unigram model: 3.9, trained thirty times slower).
"""

import collections
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from ultrathink_jax.errors import ConfigError, DataError

NUM_NUMBERS_SPECIAL = 2  # BOS and EOS of the numbers tokenizer, whose ordinary tokens follow

_MODEL_FILE = "tokenizer.model"
_JSON_FILE = "tokenizer.json"  # of the tokenizers library; ours where it holds "numbers" alone
_SETTINGS_FILE = "tokenizer_config.json"
# What transformers reads beside tokenizer.json, kept so that a model can be written with what it came with.
_COMPANION_FILES = (_SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SENTENCEPIECE_KEY = (
  "ultrathink_jax_sentencepiece"  # of tokenizer_config.json: tokenizer.json stands for tokenizer.model
)
_NUM_FIXED = 256 + 3  # bytes, unknown, BOS and EOS
_MAX_TRAINING_BYTES = 16 * 1024 * 1024  # about 5 seconds of training
_MAX_SENTENCE_CHARS = 100_000
_SPACE_SYMBOL = "\u2581"  # SentencePiece stores a space as this character


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


class SentencePieceTokenizer:
  """A SentencePiece model, ours or another's. The exact round trip is promised for models trained here.

  BOS, EOS and the unknown token are never encoded from text: "</s>" becomes ordinary pieces.
  """

  def __init__(self, model: bytes, name: str = _MODEL_FILE):
    import sentencepiece

    sentencepiece.set_min_log_level(2)
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise DataError(f"{name} is not a SentencePiece model; give a .model file that SentencePiece wrote") from error
    self._model = model
    self.vocab_size = self._processor.vocab_size()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    self.unk_id = self._processor.unk_id()
    self.fingerprint = hashlib.sha256(model).hexdigest()
    if min(self.bos_id, self.eos_id) < 0:
      raise DataError(f"{name} has no BOS or no EOS token; train it with bos_id and eos_id of 0 or more")
    ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
    self._space_symbol_ids = ids if all(self._processor.is_byte(i) for i in ids) else None

  def encode(self, text: str) -> list[int]:
    if self._space_symbol_ids is None or _SPACE_SYMBOL not in text:
      return self._processor.encode(text)
    first, *rest = text.split(_SPACE_SYMBOL)
    ids = self._processor.encode(first)
    for part in rest:
      ids += self._space_symbol_ids + self._processor.encode(part)
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    plain = [text for text in texts if _SPACE_SYMBOL not in text]
    encoded = iter(self._processor.encode(plain, num_threads=os.cpu_count() or 1) if plain else ())
    return [self.encode(text) if _SPACE_SYMBOL in text else next(encoded) for text in texts]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self._processor.decode(list(map(int, ids)))

  def save(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _MODEL_FILE).write_bytes(self._model)

  def piece(self, number: int) -> str:
    """Returns what a token spells, or the name of a byte or special token."""
    return self._processor.id_to_piece(number).replace(_SPACE_SYMBOL, " ")

  def score(self, number: int) -> float:
    """Returns the rank of a token among merges: higher ones come first."""
    return self._processor.get_score(number)

  def is_ordinary(self, number: int) -> bool:
    """Returns whether a token is neither special nor a byte."""
    p = self._processor
    return not (p.is_control(number) or p.is_unknown(number) or p.is_byte(number) or p.is_unused(number))


class JsonTokenizer:
  """A tokenizer.json of the tokenizers library, with the special tokens that the files beside it name.

  Special tokens spelled in a text become their ids, as the library does. The exact round trip is the file's own affair:
  one that normalizes text does not give it back.
  """

  def __init__(self, path: Path):
    import tokenizers

    try:
      content = path.read_bytes()
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except OSError as error:
      raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises bare Exception
      raise DataError(f"{path} is not a file of the tokenizers library: {error}") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    files = {name: path.parent / name for name in _COMPANION_FILES}
    self._files = {_JSON_FILE: content} | {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
    self.fingerprint = hashlib.sha256(content).hexdigest()
    self._special_ids = {name: self._special_id(name, path.parent) for name in ("bos", "eos")}
    bos_id, eos_id = self._special_ids.values()
    if eos_id is None:
      raise DataError(f"{path} has no EOS token; name eos_token in {_SETTINGS_FILE} beside it")
    self.eos_id = eos_id
    self.bos_id = eos_id if bos_id is None else bos_id  # documents of such models are parted by EOS alone

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    hidden = (self.bos_id, self.eos_id)
    return self._tokenizer.decode([i for i in map(int, ids) if i not in hidden], skip_special_tokens=False)

  def save(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in self._files.items():
      (directory / name).write_bytes(content)
    # What config.json alone said would be lost without it.
    settings = _read_json(directory / _SETTINGS_FILE)
    found = {f"{name}_token": number for name, number in self._special_ids.items() if number is not None}
    unsaid = {key: self._tokenizer.id_to_token(found[key]) for key in found if settings.get(key) is None}
    if unsaid:
      (directory / _SETTINGS_FILE).write_text(json.dumps(settings | unsaid, indent=2) + "\n")

  def _special_id(self, name: str, directory: Path) -> int | None:
    """Returns the id of bos or eos: of the token that a file of settings names, else the one in config.json."""
    for file in (_SETTINGS_FILE, "special_tokens_map.json"):
      token = _read_json(directory / file).get(f"{name}_token")
      token = token.get("content") if isinstance(token, dict) else token
      if token is not None and (number := self._tokenizer.token_to_id(token)) is not None:
        return number
    number = _read_json(directory / "config.json").get(f"{name}_token_id")
    return number[0] if isinstance(number, list) else number


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
    (directory / _JSON_FILE).write_text(json.dumps({"numbers": self.vocab_size}) + "\n")


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
    in_json, model = path / _JSON_FILE, path / _MODEL_FILE
    stands_for_model = model.is_file() and SENTENCEPIECE_KEY in _read_json(path / _SETTINGS_FILE)
    if in_json.is_file() and not stands_for_model:
      saved = _read_json(in_json)
      return NumbersTokenizer(saved["numbers"]) if "numbers" in saved else JsonTokenizer(in_json)
  try:
    return SentencePieceTokenizer(model.read_bytes(), str(model))
  except OSError as error:
    raise DataError(
      f"tokenizer {model} cannot be read: {error.strerror}; give the path of a .model file or of a tokenizer.json"
    ) from error


def _read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a file, {} where there is no such file."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise DataError(f"{path} is not JSON: {error}") from error


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
  """Returns a tokenizer trained on the first 16 MiB of `texts`, saved in the directory `path`.

  The model is the same, byte for byte, on every run and machine.

  Raises:
    ConfigError: the texts do not carry `vocab_size` tokens, or it is too small for bytes and characters.
  """
  sentences = list(_sentences(texts))
  try:
    try:
      model = _train(sentences, vocab_size)
    except RuntimeError as error:
      if "smaller than required_chars" not in str(error):
        raise
      model = _train(_without_rare_characters(sentences, vocab_size), vocab_size)
  except RuntimeError as error:
    largest = re.search(r"set it to a value <= (\d+)", str(error))
    if largest:
      raise ConfigError(
        f"model.vocab_size={vocab_size} is more than the training text carries; "
        f"choose at most {largest.group(1)} or give more text"
      ) from error
    raise DataError(f"SentencePiece cannot train on this text ({error}); give more text") from error
  tokenizer = SentencePieceTokenizer(model)
  tokenizer.save(path)
  return tokenizer


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  num_bytes = 0
  for text in texts:
    text = text.replace("\0", "")  # the trainer skips whatever holds a NUL
    for start in range(0, len(text), _MAX_SENTENCE_CHARS):
      sentence = text[start : start + _MAX_SENTENCE_CHARS]
      yield sentence
      num_bytes += len(sentence.encode())
    if num_bytes >= _MAX_TRAINING_BYTES:
      return


def _without_rare_characters(sentences: list[str], vocab_size: int) -> list[str]:
  """Returns the sentences with as many of their characters as fit in half of what bytes leave of the vocabulary."""
  num_kept = (vocab_size - _NUM_FIXED) // 2
  if num_kept < 1:
    raise ConfigError(
      f"model.vocab_size={vocab_size} is too small for 256 bytes, {_NUM_FIXED - 256} special tokens and characters; "
      "choose 300 or more"
    )
  counts = collections.Counter(itertools.chain.from_iterable(sentences))
  rare = sorted(counts, key=lambda character: (-counts[character], character))[num_kept:]
  table = dict.fromkeys(map(ord, rare))
  return [sentence.translate(table) for sentence in sentences]


def _train(sentences: list[str], vocab_size: int) -> bytes:
  import sentencepiece

  options: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.9999,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_by_whitespace": False,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "max_sentencepiece_length": 32,
    "max_sentence_length": 8 * _MAX_SENTENCE_CHARS,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 2,  # written into the model: a constant keeps its bytes the same on every machine
    "minloglevel": 3,
  }
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, **options
  )
  return model.getvalue()
