"""The registry of sources: what `data.source` can name, as NAME or NAME:ARGUMENT."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ultrathink_jax.config import DataConfig
from ultrathink_jax.data.documents import Corpus, Document, Splits, split
from ultrathink_jax.data.standard_library import standard_library_corpus
from ultrathink_jax.data.text_files import text_corpus
from ultrathink_jax.data.tokenizer import NUM_NUMBERS_SPECIAL
from ultrathink_jax.errors import ConfigError

_NUM_SYNTHETIC = 4096  # documents of 544 tokens on average
_MIN_TOKENS, _MAX_TOKENS = 64, 1024


class SyntheticDocuments:
  """Documents of token numbers that are uniformly random, so that no model can do better than chance."""

  def __init__(self, seeds: Sequence[int], vocab_size: int):
    self._seeds = seeds
    self._vocab_size = vocab_size

  def __len__(self) -> int:
    return len(self._seeds)

  def __getitem__(self, index: int) -> Document:
    random = np.random.Generator(np.random.Philox(key=self._seeds[index]))
    length = random.integers(_MIN_TOKENS, _MAX_TOKENS + 1)
    numbers = random.integers(NUM_NUMBERS_SPECIAL, self._vocab_size, length)
    return Document(" ".join(map(str, numbers.tolist())), str(self._seeds[index]))


def synthetic_corpus(
  argument: str, config: DataConfig, vocab_size: int, directory: Path, log: Callable[[str], None]
) -> Corpus:
  """Returns about 2 million random tokens for throughput and sanity runs: the loss stays at ln(vocab_size)."""
  del directory, log
  if argument:
    raise ConfigError(f"data.source={config.source!r} has a part after ':'; write synthetic")

  def open_splits() -> Splits:
    parts = split([str(i) for i in range(_NUM_SYNTHETIC)], config.validation_fraction)
    return Splits(*(SyntheticDocuments(part, vocab_size) for part in parts), 0)

  return Corpus(f"synthetic {vocab_size}", open_splits)


SOURCES: dict[str, Callable[[str, DataConfig, int, Path, Callable[[str], None]], Corpus]] = {
  "stdlib": standard_library_corpus,
  "synthetic": synthetic_corpus,
  "text": text_corpus,
}


def find_corpus(config: DataConfig, vocab_size: int, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the corpus that `config.source` names; sources that need files of their own put them in `directory`.

  Raises:
    ConfigError: there is no such source.
  """
  name, _, argument = config.source.partition(":")
  if name not in SOURCES:
    near = difflib.get_close_matches(name, SOURCES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "; for files write text:PATH"
    raise ConfigError(f"data.source={config.source!r} is not one of {', '.join(SOURCES)}{hint}")
  return SOURCES[name](argument, config, vocab_size, directory, log)
