"""The `synthetic` source: about 2 million random tokens, on which the loss stays at ln(vocab_size)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ultrathink_jax.data.documents import Corpus, Record, Reject
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.tokenizer import NUM_NUMBERS_SPECIAL
from ultrathink_jax.errors import ConfigError

_NUM_DOCUMENTS = 4096  # of 544 tokens on average
_NUM_SHARDS = 16
_MIN_TOKENS, _MAX_TOKENS = 64, 1024
_BYTES_PER_TOKEN = 5


class SyntheticShard(NamedTuple):
  """Documents of token numbers that are uniformly random, so that no model can do better than chance."""

  seeds: range
  vocab_size: int
  text_field: str

  @property
  def name(self) -> str:
    return f"synthetic#{self.seeds.start}"

  @property
  def num_bytes(self) -> int:
    return len(self.seeds) * _BYTES_PER_TOKEN * (_MIN_TOKENS + _MAX_TOKENS) // 2

  def read(self) -> Iterator[Record | Reject]:
    for seed in self.seeds:
      random = np.random.Generator(np.random.Philox(key=seed))
      length = random.integers(_MIN_TOKENS, _MAX_TOKENS + 1)
      numbers = random.integers(NUM_NUMBERS_SPECIAL, self.vocab_size, length)
      yield Record(f"synthetic#{seed}", {self.text_field: " ".join(map(str, numbers.tolist()))})


def synthetic_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns random tokens for throughput and sanity runs."""
  del directory, log
  if argument:
    raise ConfigError(f"source 'synthetic:{argument}' has a part after ':'; write synthetic")
  size = _NUM_DOCUMENTS // _NUM_SHARDS
  shards = [
    SyntheticShard(range(start, start + size), options.vocab_size, options.text_field)
    for start in range(0, _NUM_DOCUMENTS, size)
  ]
  return Corpus(f"synthetic {options.vocab_size}", lambda: {"": shards})
