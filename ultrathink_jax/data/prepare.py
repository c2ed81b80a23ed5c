"""From a data configuration to a tokenizer and two token stores, made on first use and found again afterwards."""

import dataclasses
import difflib
import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrathink_jax.config import DataConfig
from ultrathink_jax.data.documents import Splits
from ultrathink_jax.data.sources import find_corpus
from ultrathink_jax.data.storage import lock, read_manifest, write_directory
from ultrathink_jax.data.token_store import TokenStore, open_store, store_key, write_store
from ultrathink_jax.data.tokenizer import NumbersTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from ultrathink_jax.errors import ConfigError, DataError

_SPLITS = ("train", "validation")
_TRAINING_VERSION = 1  # raise when the same text gives another tokenizer


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """What a run reads; `fingerprint` is the same wherever tokenizer and tokens are the same."""

  tokenizer: Tokenizer
  train: TokenStore
  validation: TokenStore
  fingerprint: str


def prepare(config: DataConfig, vocab_size: int, directory: Path, log: Callable[[str], None]) -> PreparedData:
  """Returns the data of a run, kept in `directory` as tokenizer/, train/ and validation/.

  What is there is reused where it fits the configuration and the documents, and made anew where not. A trained
  tokenizer stays as long as the configuration is the same, even where the documents changed, because the weights of a
  model mean its tokens. A process that is killed leaves nothing half made; others wait for the one that prepares.

  Raises:
    ConfigError: the source or tokenizer is unknown, or the vocabulary size does not fit.
    DataError: there is no text, or too little for both splits.
  """
  directory = Path(directory)
  corpus = find_corpus(config, vocab_size, directory, log)
  kind = _tokenizer_kind(config)
  with lock(directory, log):
    open_splits = functools.cache(lambda: _open_splits(corpus.open, config, log))
    tokenizer = _find_tokenizer(kind, config, vocab_size, directory / "tokenizer", open_splits, log)
    stores = []
    for split in _SPLITS:
      key = store_key(config.source, corpus.identity, split, config.validation_fraction, tokenizer)
      store = open_store(directory / split, key)
      if store is None:
        splits, start = open_splits(), time.monotonic()
        documents = getattr(splits, split)
        store = write_store(directory / split, key, config.source, split, documents, splits.num_skipped, tokenizer)
        log(f"data: tokenized {split}: {_describe(store)}{_since(start)}")
      else:
        log(f"data: found {split}: {_describe(store)}")
      stores.append(store)
  train, validation = stores
  return PreparedData(tokenizer, train, validation, _fingerprint(tokenizer, train, validation))


def open_prepared(directory: Path) -> PreparedData:
  """Returns what `prepare` has left in `directory`, without a look at the documents. Raises DataError."""
  directory = Path(directory)
  train, validation = (open_store(directory / split) for split in _SPLITS)
  if train is None or validation is None:
    raise DataError(f"{directory} holds no prepared data; choose a --workdir that the machines of all processes see")
  tokenizer = load_tokenizer(directory / "tokenizer")
  return PreparedData(tokenizer, train, validation, _fingerprint(tokenizer, train, validation))


def _fingerprint(tokenizer: Tokenizer, train: TokenStore, validation: TokenStore) -> str:
  parts = (tokenizer.fingerprint, train.info.fingerprint, validation.info.fingerprint)
  return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _open_splits(open_corpus: Callable[[], Splits], config: DataConfig, log: Callable[[str], None]) -> Splits:
  start = time.monotonic()
  splits = open_corpus()
  if not len(splits.train) or (config.validation_fraction and not len(splits.validation)):
    raise DataError(
      f"data.source={config.source!r} holds {len(splits.train) + len(splits.validation)} documents, too few for a "
      "training and a validation split; give more text or raise data.validation_fraction"
    )
  counts = f"{len(splits.train)} training and {len(splits.validation)} validation documents"
  log(f"data: read {config.source}: {counts}{_since(start)}")
  return splits


def _tokenizer_kind(config: DataConfig) -> str:
  is_synthetic = config.source.partition(":")[0] == "synthetic"
  kinds = ("auto", "sentencepiece", "numbers")
  name = config.tokenizer
  if name == "auto":
    return "numbers" if is_synthetic else "sentencepiece"
  if name == "numbers" and not is_synthetic:
    raise ConfigError(
      f"data.tokenizer='numbers' reads the synthetic source only, not data.source={config.source!r}; "
      "choose auto or sentencepiece"
    )
  if name not in kinds and not name.endswith(".model") and not Path(name).expanduser().exists():
    near = difflib.get_close_matches(name, kinds, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"data.tokenizer={name!r} is not one of {', '.join(kinds)} or the path of a .model file{hint}")
  return name


def _find_tokenizer(
  kind: str,
  config: DataConfig,
  vocab_size: int,
  directory: Path,
  open_splits: Callable[[], Splits],
  log: Callable[[str], None],
) -> Tokenizer:
  if kind not in ("numbers", "sentencepiece"):
    tokenizer = load_tokenizer(kind)
    if tokenizer.vocab_size > vocab_size:  # fewer are fine: models pad their vocabularies
      raise ConfigError(
        f"model.vocab_size={vocab_size} but data.tokenizer={kind!r} has {tokenizer.vocab_size} tokens; "
        f"set model.vocab_size to {tokenizer.vocab_size} or more"
      )
    key = tokenizer.fingerprint
  elif kind == "numbers":
    tokenizer = NumbersTokenizer(vocab_size)
    key = tokenizer.fingerprint
  else:
    tokenizer = None
    parts = [_TRAINING_VERSION, config.source, config.validation_fraction, vocab_size]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  if read_manifest(directory, key):
    return load_tokenizer(directory)

  def write(path: Path) -> dict[str, Any]:
    start = time.monotonic()
    if tokenizer is not None:
      tokenizer.save(path)
      return {"kind": kind, "vocab_size": vocab_size, "fingerprint": tokenizer.fingerprint}
    documents = open_splits().train
    trained = train_sentencepiece((documents[i].text for i in range(len(documents))), vocab_size, path)
    log(f"data: trained a SentencePiece tokenizer of {vocab_size} tokens{_since(start)}")
    return {"kind": kind, "vocab_size": vocab_size, "fingerprint": trained.fingerprint}

  write_directory(directory, key, write)
  return load_tokenizer(directory)


def _describe(store: TokenStore) -> str:
  info = store.info
  ratio = f", {info.text_bytes / info.tokens:.2f} bytes per token" if info.tokens else ""
  return f"{info.documents} documents, {info.tokens} tokens{ratio}"


def _since(start: float) -> str:
  return f" ({time.monotonic() - start:.1f} s)"
