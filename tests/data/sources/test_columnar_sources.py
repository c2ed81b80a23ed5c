"""Parquet, ArrayRecord, TFDS and JSONL with the same contents give the same entries, whatever the shards."""

import json
import pickle

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.sources import arrayrecord, parquet, tfds
from ultrathink_jax.errors import ConfigError, DataError

ROWS = [{"text": f"text {i} ä", "number": i, "tags": ["a"] * (i % 3)} for i in range(50)]


def write_parquet(path, rows, **options):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def write_records(path, contents):
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for content in contents:
    writer.write(content)
  writer.close()


def write_tfds(directory, splits, file_format="array_record"):
  import tensorflow_datasets

  features = tensorflow_datasets.features
  with tensorflow_datasets.core.registered.skip_registration():

    class Sample(tensorflow_datasets.core.GeneratorBasedBuilder):
      """A data set to read."""

      VERSION = tensorflow_datasets.core.Version("1.2.3")

      def _info(self):
        tags = features.Sequence(features.Text())
        described = features.FeaturesDict({"text": features.Text(), "number": np.int64, "tags": tags})
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=described, disable_shuffling=True)

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

      def _generate_examples(self, rows):
        yield from enumerate(rows)

  config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
  Sample(data_dir=directory, file_format=file_format).download_and_prepare(download_config=config)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tfds")
  write_tfds(directory, {"train": ROWS[:40], "test": ROWS[40:]})
  return directory


def test_parquet_rows_are_entries(read, tmp_path):
  write_parquet(tmp_path / "a.parquet", ROWS, row_group_size=7)
  reading = read(f"parquet:{tmp_path}")
  assert [record.fields for record in reading.records] == ROWS
  assert reading.names[:2] == ["a.parquet#0", "a.parquet#1"]


def test_parquet_shards_are_row_groups_and_give_the_same_rows(read, tmp_path, monkeypatch):
  write_parquet(tmp_path / "a.parquet", ROWS, row_group_size=7)
  whole = read(f"parquet:{tmp_path}").entries
  monkeypatch.setattr(parquet, "_SHARD_BYTES", 300)
  monkeypatch.setattr(parquet, "_MAX_BATCH_ROWS", 3)
  reading = read(f"parquet:{tmp_path}")
  assert len(reading.shards) > 2
  assert reading.entries == whole
  assert pickle.loads(pickle.dumps(reading.shards[1])) == reading.shards[1]


def test_remote_parquet_is_read_as_local(read, tmp_path):
  write_parquet(tmp_path / "a.parquet", ROWS)
  fsspec.filesystem("memory").pipe("/rows/a.parquet", (tmp_path / "a.parquet").read_bytes())
  assert read("parquet:memory://rows/*.parquet").entries == read(f"parquet:{tmp_path}").entries


def test_a_parquet_row_that_is_not_utf8_is_rejected_alone(read, tmp_path):
  texts = pyarrow.array([b"one", b"t\xff", b"three"]).view(pyarrow.string())
  pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
  reading = read(f"parquet:{tmp_path}")
  assert reading.fields() == ["one", "three"]
  assert [tuple(reject)[:2] for reject in reading.rejects] == [("a.parquet#1", "is not UTF-8: byte 0xff at position 1")]


def test_records_that_are_objects_or_texts_are_entries(read, tmp_path):
  write_records(tmp_path / "a.array_record", [json.dumps(row).encode() for row in ROWS])
  write_records(tmp_path / "b.array_record-00000-of-00001", [b"one", b"{two", "drei ä".encode()])
  assert [record.fields for record in read(f"arrayrecord:{tmp_path}/a*").records] == ROWS
  assert read(f"arrayrecord:{tmp_path}/b*", text_field="body").fields("body") == ["one", "{two", "drei ä"]
  assert len(read(f"arrayrecord:{tmp_path}").records) == 53


def test_a_bad_record_is_rejected_alone(read, tmp_path):
  write_records(tmp_path / "a.array_record", [b'{"text": "one"}', b"{half", b"\xff", b'{"text": "long %d"}' % 10**99])
  reading = read(f"arrayrecord:{tmp_path}", max_record_bytes=100)
  assert reading.fields() == ["one"]
  assert [reject.where for reject in reading.rejects] == [f"a.array_record#{i}" for i in (1, 2, 3)]


def test_record_shards_give_the_same_records(read, tmp_path, monkeypatch):
  write_records(tmp_path / "a.array_record", [json.dumps(row).encode() for row in ROWS])
  whole = read(f"arrayrecord:{tmp_path}").entries
  monkeypatch.setattr(arrayrecord, "_SHARD_BYTES", 30_000)
  monkeypatch.setattr(arrayrecord, "_MAX_BATCH", 3)
  reading = read(f"arrayrecord:{tmp_path}")
  assert len(reading.shards) > 2
  assert reading.entries == whole


@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=10))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_that_are_written_are_read_from_every_container(read, tmp_path_factory, texts):
  texts = [text.encode("utf-8", "replace").decode() for text in texts]
  folder = tmp_path_factory.mktemp("containers")
  rows = [{"text": text} for text in texts]
  write_parquet(folder / "a.parquet", rows)
  write_records(folder / "a.array_record", [json.dumps(row).encode() for row in rows])
  (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert read(f"parquet:{folder}").fields() == texts
  assert read(f"arrayrecord:{folder}").fields() == texts
  assert read(f"jsonl:{folder}").fields() == texts


def test_a_prepared_data_set_is_found_in_its_folder_or_above(read, prepared):
  version = prepared / "sample" / "1.2.3"
  for folder in (version, version.parent, prepared):
    reading = read(f"tfds:{folder}")
    assert [record.fields for record in reading.records] == ROWS
    assert reading.names[0] == "train#0"


def test_without_a_validation_split_all_but_test_is_split_by_name(read, prepared):
  splits = read(f"tfds:{prepared}").splits
  assert {split: sum(1 for shard in shards for _ in shard.read()) for split, shards in splits.items()} == {
    "": 40,
    "test": 10,
  }


def test_a_validation_split_is_kept(read, tmp_path):
  write_tfds(tmp_path, {"train": ROWS[:3], "validation": ROWS[3:5]})
  assert {split: len(list(shards[0].read())) for split, shards in read(f"tfds:{tmp_path}").splits.items()} == {
    "train": 3,
    "validation": 2,
  }


def test_prepared_shards_give_the_same_examples(read, prepared, monkeypatch):
  whole = read(f"tfds:{prepared}").entries
  monkeypatch.setattr(tfds, "_SHARD_BYTES", 200)
  monkeypatch.setattr(tfds, "_BATCH", 3)
  reading = read(f"tfds:{prepared}")
  assert len(reading.shards) > 4
  assert reading.entries == whole
  assert pickle.loads(pickle.dumps(reading.shards[1])) == reading.shards[1]


def test_two_prepared_data_sets_are_not_chosen_from(read, tmp_path):
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "dataset_info.json").write_text("{}")
  with pytest.raises(DataError, match="holds 2 prepared data sets"):
    read(f"tfds:{tmp_path}")


def test_a_prepared_data_set_that_is_damaged_is_a_data_error(read, tmp_path):
  write_tfds(tmp_path, {"train": ROWS})
  (file,) = tmp_path.glob("sample/1.2.3/*.array_record*")
  file.write_bytes(file.read_bytes()[:70_000])
  with pytest.raises(DataError, match="prepare it anew"):
    read(f"tfds:{tmp_path}")
  (tmp_path / "sample" / "1.2.3" / "dataset_info.json").write_text("{half")
  with pytest.raises(DataError, match="prepare it anew"):
    read(f"tfds:{tmp_path}")


@pytest.mark.parametrize("argument", ["", "nowhere"])
def test_a_source_of_a_prepared_data_set_needs_its_folder(read, argument):
  with pytest.raises((ConfigError, DataError)):
    read(f"tfds:{argument}")
