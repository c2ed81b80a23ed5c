"""Sources are found by name; the standard library and the synthetic source are there everywhere."""

import difflib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ultrathink_jax.data.documents import Shard
from ultrathink_jax.data.sources import SOURCES, SourceOptions, find_corpus
from ultrathink_jax.data.tokenizer import NumbersTokenizer
from ultrathink_jax.errors import ConfigError


def find(source, directory=Path("unused"), **options):
  return find_corpus(source, SourceOptions(**options), directory, lambda message: None)


def entries(corpus):
  return [entry for shards in corpus.open().values() for shard in shards for entry in shard.read()]


@pytest.mark.parametrize("name", ["stdlb", "jsnl", "wikitxt", "sintetic:x", "parqet:/data"])
def test_an_unknown_source_names_the_nearest(name):
  near = difflib.get_close_matches(name.partition(":")[0], SOURCES, 1)[0]
  with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
    find(name)


@pytest.mark.parametrize("source", ["", "xyz:\n", ":path"])
def test_an_unknown_source_that_is_near_none_is_told_of_files_in_one_line(source):
  with pytest.raises(ConfigError, match="for files write text:PATH") as error:
    find(source)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["stdlib:3.11", "synthetic:8"])
def test_an_argument_where_none_belongs_is_refused(source):
  with pytest.raises(ConfigError, match="has a part after"):
    find(source)


def test_synthetic_text_stays_within_the_vocabulary_and_covers_it():
  tokenizer = NumbersTokenizer(50)
  texts = [entry.fields["text"] for entry in entries(find("synthetic", vocab_size=50))[:8]]
  tokens = np.concatenate([tokenizer.encode(text) for text in texts])
  assert set(tokens.tolist()) == set(range(2, 50))


def test_synthetic_documents_are_the_same_every_time_and_of_many_lengths():
  one, other = (entries(find("synthetic", vocab_size=100)) for _ in range(2))
  assert one == other
  assert len({len(entry.fields["text"]) for entry in one[:20]}) > 15
  assert len({entry.where for entry in one}) == 4096


def test_synthetic_shards_say_about_how_large_they_are():
  (shards,) = find("synthetic", vocab_size=50_000).open().values()
  assert all(isinstance(shard, Shard) for shard in shards)
  size = sum(len(entry.fields["text"]) for shard in shards for entry in shard.read())
  assert 0.8 < size / sum(shard.num_bytes for shard in shards) < 1.3


def test_the_standard_library_is_prepared_once_and_named_by_its_paths(tmp_path):
  corpus = find("stdlib", tmp_path, text_field="body")
  first = entries(corpus)
  files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
  assert entries(find("stdlib", tmp_path, text_field="body")) == first
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
  texts = {entry.where: entry.fields["body"] for entry in first}
  assert texts["json/decoder.py"] == (Path(sys.modules["json"].__file__).parent / "decoder.py").read_text()
  assert len(texts) > 300


def test_finding_a_source_imports_no_heavy_library():
  program = """
import sys
from ultrathink_jax.data.sources import find_corpus
from ultrathink_jax.data.formats import make_format
assert not {"jax", "tensorflow_datasets", "pyarrow", "fsspec", "datasets", "torch", "tensorflow"} & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
