"""Data sets of the hub are named by owner, name, configuration and revision, and read with `datasets`."""

import json
import subprocess
import sys

import pyarrow
import pytest

from ultrathink_jax.data.sources.hugging_face import Place, find_place
from ultrathink_jax.errors import ConfigError, DataError


@pytest.mark.parametrize(
  ("argument", "expected"),
  [
    ("squad", Place("squad", None, None, False)),
    ("allenai/c4", Place("allenai/c4", None, None, False)),
    ("allenai/c4/en", Place("allenai/c4", "en", None, False)),
    ("a/b/c@refs/convert/parquet", Place("a/b", "c", "refs/convert/parquet", False)),
    ("a/b@1.0", Place("a/b", None, "1.0", False)),
  ],
)
def test_a_name_has_owner_configuration_and_revision(argument, expected):
  assert find_place(argument) == expected


def test_a_path_that_is_there_is_local(tmp_path):
  assert find_place(str(tmp_path)) == Place(str(tmp_path), None, None, True)


@pytest.mark.parametrize("argument", ["", "/nowhere", "./nowhere", "a//b", "a/b/c/d", "~/nowhere"])
def test_what_is_neither_a_name_nor_there_is_refused(argument):
  with pytest.raises(ConfigError, match="hf:OWNER/NAME"):
    find_place(argument)


def test_without_the_package_the_error_says_how_to_install_it(read, monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(DataError, match="pip install 'datasets"):
    read("hf:allenai/c4")


@pytest.fixture
def rows(tmp_path):
  rows = [{"text": f"text {i}"} for i in range(10)]
  for split, part in (("train", rows[:8]), ("test", rows[8:])):
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
  return rows


def test_a_local_folder_is_streamed(read, tmp_path, rows):
  pytest.importorskip("datasets")
  reading = read(f"hf:{tmp_path}")
  assert [record.fields for record in reading.records] == rows
  assert reading.names[0] == "train-0#0"
  assert list(reading.splits) == ["", "test"]


def test_what_was_saved_by_the_library_is_read(read, tmp_path, rows):
  datasets = pytest.importorskip("datasets")
  table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows))
  datasets.Dataset(table, fingerprint="rows").save_to_disk(str(tmp_path / "saved"))
  assert [record.fields for record in read(f"hf:{tmp_path}/saved").records] == rows


def test_reading_does_not_import_torch_or_tensorflow(tmp_path, rows):
  pytest.importorskip("datasets")
  program = f"""
import sys
from pathlib import Path
from ultrathink_jax.data.sources import SourceOptions, find_corpus
corpus = find_corpus("hf:{tmp_path}", SourceOptions(), Path("unused"), print)
assert sum(1 for shards in corpus.open().values() for shard in shards for entry in shard.read()) == 10
assert not {{"torch", "tensorflow", "jax"}} & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
