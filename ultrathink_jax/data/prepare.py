"""From a data configuration to a tokenizer and token stores, made on first use and found again afterwards."""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ultrathink_jax.config import CodeConfig, DataConfig, QualityConfig
from ultrathink_jax.data.building import Task, Work, build, plan_tasks, sample_texts
from ultrathink_jax.data.chat import find_chat_template
from ultrathink_jax.data.code import CodeOptions, make_options
from ultrathink_jax.data.documents import Corpus
from ultrathink_jax.data.quality import make_quality
from ultrathink_jax.data.sentence_piece import train_sentencepiece
from ultrathink_jax.data.sources import SourceOptions, find_corpus
from ultrathink_jax.data.storage import lock, read_manifest, write_directory
from ultrathink_jax.data.token_store import SPLITS, StoreInfo, TokenStore, open_info
from ultrathink_jax.data.tokenizer import BytesTokenizer, NumbersTokenizer, Tokenizer, load_tokenizer
from ultrathink_jax.errors import ConfigError, DataError

_FORMAT = 2  # raise when the files of a store or what is in them change
_TRAINING_VERSION = 1  # raise when the same text gives another tokenizer
_MAX_TRAINING_BYTES = 16 * 1024 * 1024  # of a tokenizer; about 5 seconds
_PARALLEL_BYTES = 64 * 1024 * 1024  # below, processes take longer to start than to work
_PREPARED = "prepared.json"
_TRAINED = ("bpe", "unigram")
_KINDS = ("auto", *_TRAINED, "bytes", "numbers")


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """What a run reads.

  Attributes:
    train: a store for each source, in the order of the configuration.
    validation: the documents of all sources, mixed.
    fingerprint: the same wherever tokenizer and tokens are the same.
  """

  tokenizer: Tokenizer
  train: tuple[TokenStore, ...]
  validation: TokenStore
  fingerprint: str

  @property
  def infos(self) -> tuple[StoreInfo, ...]:
    """What the store of each source says."""
    return self.validation.infos


class _Source:
  """A source of the configuration: its shards are listed when they are needed first."""

  def __init__(self, spec: str, corpus: Corpus):
    self.spec = spec
    self.identity = corpus.identity
    self._open = corpus.open

  @functools.cached_property
  def tasks(self) -> list[Task]:
    return plan_tasks(self._open())


class _Given:
  """What is asked for: the sources that are named, and what is done to each of their entries."""

  def __init__(
    self,
    config: DataConfig,
    vocab_size: int,
    directory: Path,
    log: Callable[[str], None],
    quality: QualityConfig | None,
    code: CodeConfig | None,
  ):
    self.config = config
    self.vocab_size = vocab_size
    self.directory = directory
    self.log = log
    self.kind = _tokenizer_kind(config)
    self.tokenizer = None if self.kind in _TRAINED else _load(self.kind, vocab_size)
    options = SourceOptions(
      text_field=config.text_field,
      vocab_size=vocab_size,
      code=CodeOptions() if code is None else make_options(code, config.validation_fraction, config.workers),
      tokenizer=self.tokenizer,
    )
    self.sources = [_Source(spec, find_corpus(spec, options, directory, log)) for spec, _ in config.sources]
    self.work = Work(
      format=config.format,
      text_field=config.text_field,
      chat_template=find_chat_template(config.chat_template, config.tokenizer),
      threshold=config.validation_fraction,
      is_strict=config.on_error == "strict",
      quality=None if quality in (None, QualityConfig()) else make_quality(quality),
    )

  @property
  def tokenizer_directory(self) -> Path:
    return self.directory / "tokenizer"


def prepare(
  config: DataConfig,
  vocab_size: int,
  directory: Path,
  log: Callable[[str], None],
  quality: QualityConfig | None = None,
  code: CodeConfig | None = None,
) -> PreparedData:
  """Returns the data of a run, kept in `directory` as tokenizer/ and tokens/, a store for each source.

  What is there is reused where it fits the configuration and the files, and made anew where not. A trained tokenizer
  stays as long as the configuration is the same, even where the files changed, because the weights of a model mean its
  tokens. A process that is killed leaves what it has finished, which the next one goes on from; others wait for the one
  that prepares.

  Raises:
    ConfigError: a source or the tokenizer is unknown, or the vocabulary size does not fit.
    DataError: an entry is bad and data.on_error strict, or there is too little for both splits.
  """
  directory = Path(directory)
  with lock(directory, log):
    given = _Given(config, vocab_size, directory, log, quality, code)
    tokenizer = _find_tokenizer(given)
    stores = {}
    for source in given.sources:
      place = directory / "tokens" / _slug(source.spec)
      stores[str(place.relative_to(directory))] = _find_store(given, source, place, tokenizer).key
    (directory / _PREPARED).write_text(json.dumps({"stores": stores}))
  return open_prepared(directory)


def prepare_tokenizer(
  config: DataConfig,
  vocab_size: int,
  directory: Path,
  log: Callable[[str], None],
  quality: QualityConfig | None = None,
  code: CodeConfig | None = None,
) -> Tokenizer:
  """Returns the tokenizer of a run, as `prepare` finds or trains it, and tokenizes nothing. Raises what that does."""
  directory = Path(directory)
  with lock(directory, log):
    return _find_tokenizer(_Given(config, vocab_size, directory, log, quality, code))


def open_prepared(directory: Path) -> PreparedData:
  """Returns what `prepare` has left in `directory`, without a look at the sources. Raises DataError."""
  directory = Path(directory)
  try:
    places = json.loads((directory / _PREPARED).read_text())["stores"]
  except (OSError, ValueError, KeyError) as error:
    raise DataError(
      f"{directory} holds no prepared data; choose a --workdir that the machines of all processes see"
    ) from error
  infos = {directory / place: open_info(directory / place, key) for place, key in places.items()}
  if None in infos.values():
    raise DataError(f"{directory} lost part of its prepared data; give the command that prepared it again")
  tokenizer = load_tokenizer(directory / "tokenizer")
  train = tuple(TokenStore([place], [info], SPLITS[0]) for place, info in infos.items())
  parts = [tokenizer.fingerprint, *(info.fingerprint[split] for info in infos.values() for split in SPLITS)]
  fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
  return PreparedData(tokenizer, train, TokenStore(list(infos), list(infos.values()), SPLITS[1]), fingerprint)


def _find_store(given: _Given, source: _Source, place: Path, tokenizer: Tokenizer) -> StoreInfo:
  """Returns what the store of a source says, after it is built if it is not there or does not fit."""
  config, log = given.config, given.log
  key = _key(source, given.work, tokenizer)
  if info := open_info(place, key):
    log(f"data: found {source.spec}: {_describe(info)}")
    return info
  start = time.monotonic()

  def write(path: Path) -> dict[str, Any]:
    total = sum(task.num_bytes for task in source.tasks)
    workers = (config.workers or len(os.sched_getaffinity(0))) if total >= _PARALLEL_BYTES else 1
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"data: {source.spec}", disable=None, leave=False) as bar:
      counts = build(path, source.tasks, given.work, given.tokenizer_directory, workers, bar.update)
    return {"source": source.spec, "num_bytes": total, **counts}

  info = StoreInfo(**write_directory(place, key, write, is_resumable=True))
  documents = [info.documents[split] for split in SPLITS]
  if not documents[0] or (config.validation_fraction and not documents[1]):
    raise _too_few(source.spec, sum(documents))
  log(f"data: tokenized {source.spec}: {_describe(info)} ({time.monotonic() - start:.1f} s)")
  for what, counts in (("left out entries", info.left_out), ("replaced secrets", info.scrubbed)):
    if counts:
      reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
      log(f"data: {what} of {source.spec}: {reasons}")
  if info.left_out:
    log(f"data: each entry left out is in {place}/rejects.jsonl")
  return info


def _key(source: _Source, work: Work, tokenizer: Tokenizer) -> str:
  """Returns a hash of all that decides what a store holds."""
  rules: Any = None
  if work.quality:
    files = [Path(path).expanduser() for path in work.quality.options.decontaminate]
    rules = dataclasses.asdict(work.quality.options) | {"files": [_hash_file(file) for file in files]}
  work = dataclasses.replace(work, quality=None)
  parts = [_FORMAT, source.spec, source.identity, dataclasses.asdict(work), rules, tokenizer.fingerprint]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _hash_file(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _too_few(spec: str, num_documents: int) -> DataError:
  return DataError(
    f"data.source={spec!r} holds {num_documents} documents, too few for a training and a validation split; "
    "give more text or raise data.validation_fraction"
  )


def _tokenizer_kind(config: DataConfig) -> str:
  is_synthetic = any(spec.partition(":")[0] == "synthetic" for spec, _ in config.sources)
  name = config.tokenizer
  if is_synthetic and len(config.sources) > 1:
    raise ConfigError("data.mixture has the synthetic source, which has a tokenizer of its own; give it alone")
  if name == "auto":
    return "numbers" if is_synthetic else "bpe"
  if name == "numbers" and not is_synthetic:
    raise ConfigError(
      f"data.tokenizer='numbers' reads the synthetic source only, not data.source={config.source!r}; "
      "choose auto, bpe, unigram or bytes"
    )
  if name not in _KINDS and not name.endswith(".model") and not Path(name).expanduser().exists():
    near = difflib.get_close_matches(name, _KINDS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"data.tokenizer={name!r} is not one of {', '.join(_KINDS)} or the path of a .model file{hint}")
  return name


def _find_tokenizer(given: _Given) -> Tokenizer:
  kind, config, vocab_size, directory = given.kind, given.config, given.vocab_size, given.tokenizer_directory
  if kind in _TRAINED:
    tokenizer = None
    specs = [source.spec for source in given.sources]
    parts = [_TRAINING_VERSION, kind, specs, config.validation_fraction, vocab_size, config.special_tokens]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  else:
    tokenizer = given.tokenizer
    key = tokenizer.fingerprint
  if read_manifest(directory, key):
    return load_tokenizer(directory)

  def write(path: Path) -> dict[str, Any]:
    made = _train(given, path) if tokenizer is None else tokenizer
    if tokenizer is not None:
      tokenizer.save(path)
    return {"kind": kind, "vocab_size": vocab_size, "fingerprint": made.fingerprint}

  write_directory(directory, key, write)
  return load_tokenizer(directory)


def _load(kind: str, vocab_size: int) -> Tokenizer:
  """Returns a tokenizer that needs no training."""
  if kind == "numbers":
    return NumbersTokenizer(vocab_size)
  tokenizer = BytesTokenizer() if kind == "bytes" else load_tokenizer(kind)
  if tokenizer.vocab_size > vocab_size:  # fewer are fine: models pad their vocabularies
    raise ConfigError(
      f"model.vocab_size={vocab_size} but data.tokenizer={kind!r} has {tokenizer.vocab_size} tokens; "
      f"set model.vocab_size to {tokenizer.vocab_size} or more"
    )
  return tokenizer


def _train(given: _Given, path: Path) -> Tokenizer:
  """Returns a tokenizer of the kind asked for, trained on documents of all sources and saved at `path`."""
  config, start = given.config, time.monotonic()
  texts: list[str] = []
  for source in given.sources:
    sampled, num_documents = sample_texts(given.work, source.tasks, _MAX_TRAINING_BYTES // len(given.sources))
    if num_documents < 1 + (config.validation_fraction > 0):
      raise _too_few(source.spec, num_documents)
    texts += sampled
  trained = train_sentencepiece(texts, given.vocab_size, path, given.kind, config.special_tokens)
  seconds = time.monotonic() - start
  given.log(f"data: trained a {given.kind} SentencePiece tokenizer of {given.vocab_size} tokens ({seconds:.1f} s)")
  return trained


def _slug(spec: str) -> str:
  """Returns a name for a directory that tells sources apart and can be read."""
  readable = re.sub(r"[^A-Za-z0-9.]+", "-", spec).strip("-")[-40:]
  return f"{readable}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


def _describe(info: StoreInfo) -> str:
  documents, tokens = ([counts[split] for split in SPLITS] for counts in (info.documents, info.tokens))
  ratio = f", {sum(info.text_bytes.values()) / sum(tokens):.2f} bytes per token" if sum(tokens) else ""
  return (
    f"{documents[0]:,} training and {documents[1]:,} validation documents, "
    f"{tokens[0]:,} and {tokens[1]:,} tokens{ratio}"
  )
