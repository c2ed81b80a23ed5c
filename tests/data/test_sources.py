"""Sources are found by name, and the synthetic one stays within its vocabulary."""

from pathlib import Path

import numpy as np
import pytest

from ultrathink_jax.config import DataConfig
from ultrathink_jax.data.sources import SyntheticDocuments, find_corpus
from ultrathink_jax.data.tokenizer import NumbersTokenizer
from ultrathink_jax.errors import ConfigError


def find(source):
  return find_corpus(DataConfig(source, "auto", 0.05), 100, Path("unused"), print)


def test_an_unknown_source_names_the_nearest():
  with pytest.raises(ConfigError, match="did you mean 'stdlib'"):
    find("stdlb")


@pytest.mark.parametrize("source", ["stdlib:3.11", "synthetic:8"])
def test_an_argument_where_none_belongs_is_refused(source):
  with pytest.raises(ConfigError, match="has a part after"):
    find(source)


def test_synthetic_text_stays_within_the_vocabulary_and_covers_it():
  documents = SyntheticDocuments(range(8), vocab_size=50)
  tokens = np.concatenate([NumbersTokenizer(50).encode(documents[i].text) for i in range(8)])
  assert set(tokens.tolist()) == set(range(2, 50))


def test_synthetic_documents_are_the_same_every_time_and_of_many_lengths():
  one, other = (find("synthetic").open().train for _ in range(2))
  assert one[5] == other[5]
  assert len({len(one[i].text) for i in range(20)}) > 15
