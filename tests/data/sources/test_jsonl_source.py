"""What is written as JSON is read, line by line or as a list, plain or compressed, in any number of shards."""

import gzip
import json
import pickle

import fsspec
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.documents import BadRecordError
from ultrathink_jax.data.sources import json_objects, jsonl
from ultrathink_jax.data.sources.json_objects import parse_list
from ultrathink_jax.data.sources.jsonl import line_ranges, split_lines
from ultrathink_jax.errors import DataError

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
  lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=4),
  max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), min_size=1, max_size=12)


def lines_of(objects, end="\n"):
  return "".join(json.dumps(item, ensure_ascii=False) + end for item in objects).encode("utf-8", "surrogatepass")


def blocks_of(content, size):
  return [content[start : start + size] for start in range(0, len(content), size)]


def compressed(content, suffix):
  if suffix == ".zst":
    return pyarrow.compress(content, codec="zstd", asbytes=True)
  return gzip.compress(content) if suffix == ".gz" else content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_are_read_with_their_numbers(read, tmp_path, suffix):
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(compressed(b'{"text": "one"}\r\n\n  \n{"text": "tw\xc3\xb6"}', suffix))
  reading = read(f"jsonl:{path}")
  assert reading.names == [f"a.jsonl{suffix}:1", f"a.jsonl{suffix}:4"]
  assert reading.fields() == ["one", "twö"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_parts_that_were_put_together_are_all_read(read, tmp_path, suffix):
  parts = [compressed(f'{{"text": "{i}"}}\n'.encode(), suffix) for i in range(3)]
  (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(parts))
  assert read(f"jsonl:{tmp_path}").fields() == ["0", "1", "2"]


@given(objects=OBJECTS, end=st.sampled_from(["\n", "\r\n", "\n\n"]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_in_lines_is_read(tmp_path_factory, objects, end):
  path = tmp_path_factory.mktemp("lines") / "a.jsonl"
  path.write_bytes(lines_of(objects, end))
  shard = jsonl.JsonlShard("a", 0, "a", str(path), 0, None, 1, 1 << 20)
  assert [entry.fields for entry in shard.read()] == objects


@given(objects=OBJECTS, indent=st.sampled_from([None, 2]), size=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_what_is_written_as_a_list_is_read_from_any_pieces(objects, indent, size):
  text = " " + json.dumps(objects, indent=indent) + "\n"
  assert list(parse_list(iter(blocks_of(text, size)), 1_000_000)) == objects


@pytest.mark.parametrize(
  "text", ["[", "[1", "[1,", "[1,]", "[1 2]", "[1]]", "[nul]", "[NaN]", '[{"a": 1, "a": 2}]', "{}", ""]
)
def test_a_list_that_is_not_json_is_refused(text):
  with pytest.raises(BadRecordError):
    list(parse_list(iter([text]), 100))


def test_a_list_is_read_as_lines_are(read, tmp_path):
  items = [{"text": f"item {i}"} for i in range(20)]
  (tmp_path / "list.json").write_text(json.dumps(items, indent=1))
  (tmp_path / "lines.json").write_bytes(lines_of(items))
  reading = read(f"jsonl:{tmp_path}/list.json")
  assert reading.fields() == read(f"jsonl:{tmp_path}/lines.json").fields()
  assert reading.names[:2] == ["list.json#0", "list.json#1"]


@given(content=st.text("ab\n", max_size=60).map(str.encode), size=st.integers(1, 20), longest=st.integers(4, 10))
@settings(max_examples=300, deadline=None)
def test_lines_do_not_depend_on_the_blocks_they_come_in(content, size, longest):
  expected = content.split(b"\n")
  expected = [line if len(line) <= longest else None for line in (expected if expected[-1] else expected[:-1])]
  assert list(split_lines(blocks_of(content, size), longest, "a")) == expected


@given(content=st.text("ab\n", max_size=80).map(str.encode), size=st.integers(1, 20), range_bytes=st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_ranges_are_whole_lines_that_join_to_the_file_and_are_numbered(content, size, range_bytes):
  ranges = line_ranges(blocks_of(content, size), range_bytes)
  assert b"".join(content[start:stop] for start, stop, _ in ranges) == content
  for start, stop, line in ranges:
    assert line == content.count(b"\n", 0, start) + 1
    assert start == 0 or content[start - 1 : start] == b"\n"
    assert stop - start >= range_bytes or stop == len(content)


def test_a_large_file_is_read_in_many_shards_as_in_one(read, tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"".join(b'{"text": "%d"}\n' % i + (b"bad\n" if i % 500 == 0 else b"") for i in range(5000)))
  whole = read(f"jsonl:{path}")
  monkeypatch.setattr(jsonl, "_SHARD_BYTES", 10_000)
  parts = read(f"jsonl:{path}")
  assert len(whole.shards) == 1
  assert len(parts.shards) > 5
  assert parts.entries == whole.entries
  assert parts.identity == whole.identity
  assert len(parts.rejects) == 10


def test_shards_can_be_pickled(read, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
  (tmp_path / "b.json").write_text('[{"text": "one"}]')
  for shard in read(f"jsonl:{tmp_path}").shards:
    assert list(pickle.loads(pickle.dumps(shard)).read()) == list(shard.read())


def test_remote_lines_are_read_as_local_ones(read, tmp_path):
  content = gzip.compress(b'{"text": "one"}\nbad\n')
  (tmp_path / "a.jsonl.gz").write_bytes(content)
  fsspec.filesystem("memory").pipe("/lines/a.jsonl.gz", content)
  assert read("jsonl:memory://lines").entries == read(f"jsonl:{tmp_path}").entries


def test_a_folder_gives_its_json_files_only(read, tmp_path):
  for name in ("a.jsonl", "b.ndjson", "c.json", "README.md", "d.jsonl.zst.tmp"):
    (tmp_path / name).write_text('{"text": "one"}\n')
  assert read(f"jsonl:{tmp_path}").names == ["a.jsonl:1", "b.ndjson:1", "c.json:1"]


def test_a_long_line_is_skipped_and_the_next_one_read(read, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n{"text": "short"}\n' % ("x" * 500))
  reading = read(f"jsonl:{tmp_path}", max_record_bytes=100)
  assert [reject.reason for reject in reading.rejects] == ["is longer than 100 bytes"]
  assert reading.names == ["a.jsonl:1", "a.jsonl:2"]


def test_a_file_without_line_ends_is_given_up(read, tmp_path):
  (tmp_path / "a.jsonl").write_text("x" * 5000)
  with pytest.raises(DataError, match="it is not JSONL"):
    read(f"jsonl:{tmp_path}", max_record_bytes=100)


def test_a_large_line_of_too_many_values_is_refused_before_it_is_read(monkeypatch):
  monkeypatch.setattr(json_objects, "_LARGE_BYTES", 100)
  monkeypatch.setattr(json_objects, "_MAX_VALUES", 1000)
  with pytest.raises(BadRecordError, match="more than 1,000 values"):
    json_objects.parse_object(b'{"a": [' + b"[]," * 1000 + b"1]}")
