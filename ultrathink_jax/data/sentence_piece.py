"""SentencePiece models: trained here, or another's.

What is trained is byte-pair encoding, or a unigram model, with byte fallback and without any normalisation. Pieces may
cross spaces and line ends: "):\n        return" costs two or three tokens, and 4096 tokens reach 4.2 bytes per token on
Python source by byte pairs, where pieces that stop at spaces reach 3.3 (a unigram model: 3.9, trained thirty times
slower).
"""

import collections
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from ultrathink_jax.errors import ConfigError, DataError

MODEL_FILE = "tokenizer.model"
SENTENCEPIECE_KEY = (
  "ultrathink_jax_sentencepiece"  # of tokenizer_config.json: tokenizer.json stands for tokenizer.model
)
_NUM_FIXED = 256 + 3  # bytes, unknown, BOS and EOS
_MAX_TRAINING_BYTES = 16 * 1024 * 1024  # about 5 seconds of training
_MAX_SENTENCE_CHARS = 100_000
_SPACE_SYMBOL = "\u2581"  # SentencePiece stores a space as this character


class SentencePieceTokenizer:
  """A SentencePiece model, ours or another's. The exact round trip is promised for models trained here.

  BOS, EOS and the unknown token are never encoded from text: "</s>" becomes ordinary pieces.

  Attributes:
    num_threads: that encode a batch, in this process.
  """

  num_threads = len(os.sched_getaffinity(0))

  def __init__(self, model: bytes, name: str = MODEL_FILE):
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
    encoded = iter(self._processor.encode(plain, num_threads=self.num_threads) if plain else ())
    return [self.encode(text) if _SPACE_SYMBOL in text else next(encoded) for text in texts]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self._processor.decode(list(map(int, ids)))

  def save(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL_FILE).write_bytes(self._model)

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


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int, path: Path, kind: str = "bpe", special_tokens: Sequence[str] = ()
) -> SentencePieceTokenizer:
  """Returns a tokenizer trained on the first 16 MiB of `texts`, saved in the directory `path`.

  `kind` is bpe or unigram. Each of `special_tokens` is one token wherever a text spells it. The model is the same, byte
  for byte, on every run and machine.

  Raises:
    ConfigError: the texts do not carry `vocab_size` tokens, or it is too small for bytes and characters.
  """
  sentences = list(_sentences(texts))
  try:
    try:
      model = _train(sentences, vocab_size, kind, special_tokens)
    except RuntimeError as error:
      if "smaller than required_chars" not in str(error):
        raise
      kept = _without_rare_characters(sentences, vocab_size)
      model = _train(kept, vocab_size, kind, special_tokens)
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


def _train(sentences: list[str], vocab_size: int, kind: str, special_tokens: Sequence[str]) -> bytes:
  import sentencepiece

  options: dict[str, Any] = {
    "model_type": kind,
    "user_defined_symbols": list(special_tokens),
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
