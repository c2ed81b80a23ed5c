"""Whatever lies in a file is read, rejected entry by entry or refused as a whole: in a line, soon, in little memory."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ultrathink_jax.errors import ConfigError, DataError

GOOD = b'{"text": "good"}\n'


def zst(content):
  return pyarrow.compress(content, codec="zstd", asbytes=True)


def damaged(content, start):
  return content[:start] + b"\xff" * 99 + content[start + 99 :]


def parquet(tmp_path, size=1000):
  path = tmp_path / "whole"
  pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(size)]}), path)
  return path.read_bytes()


def array_record(tmp_path):
  writer = ArrayRecordWriter(str(tmp_path / "whole"), "group_size:1")
  for number in range(2000):
    writer.write(json.dumps({"text": os.urandom(50).hex(), "number": number}).encode())
  writer.close()
  return (tmp_path / "whole").read_bytes()


# What a line beside two good ones is rejected for; None where it is no error.
LINES = {
  "not json": (b"hello", "is not JSON: Expecting value at character 1"),
  "half a line": (b'{"text": "ha', "is not JSON: Unterminated string"),
  "half an object": (b'{"text": "half"', "is not JSON: Expecting ','"),
  "two objects": (b"{}{}", "is not JSON: Extra data"),
  "single quotes": (b"{'text': 1}", "is not JSON: Expecting property name"),
  "trailing comma": (b'{"text": "a",}', "is not JSON"),
  "comment": (b'{"text": "a"} // note', "is not JSON: Extra data"),
  "a list": (b'["text"]', "is a list, not an object"),
  "a string": (b'"text"', "is a string, not an object"),
  "a number": (b"17", "is a number, not an object"),
  "null": (b"null", "is null, not an object"),
  "invalid utf-8": (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at position 10"),
  "utf-8 cut short": (b'{"text": "\xe6\xbc"}', "is not UTF-8: byte 0xe6"),
  "encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "is not UTF-8: byte 0xed"),
  "utf-16": ('{"text": "a"}'.encode("utf-16"), "is not UTF-8: byte 0xff"),
  "mark within": (b'\xef\xbb\xbf{"text": "a"}', "is not JSON"),
  "NUL bytes": (b"\0" * 100, "is not JSON: Expecting value"),
  "NUL in a string": (b'{"text": "a\0b"}', "is not JSON: Invalid control character"),
  "tab in a string": (b'{"text": "a\tb"}', "is not JSON: Invalid control character"),
  "bad escape": (b'{"text": "\\x"}', "is not JSON: Invalid \\escape"),
  "deep list": (b"[" * 100_000, "is nested too deeply"),
  "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
  "NaN": (b'{"score": NaN}', "holds NaN, which is not JSON"),
  "Infinity": (b'{"score": Infinity}', "holds Infinity, which is not JSON"),
  "minus Infinity": (b'{"score": -Infinity}', "holds -Infinity, which is not JSON"),
  "a huge number": (b'{"n": ' + b"9" * 5000 + b"}", "holds a number of too many digits"),
  "duplicate keys": (b'{"text": "a", "text": "b"}', "has the key 'text' twice"),
  "duplicate long keys": (b'{"%s": 1, "%s": 2}' % (b"k" * 999, b"k" * 999), "has the key 'kkk"),
  "duplicate keys within": (b'{"a": {"b": 1, "b": 1}}', "has the key 'b' twice"),
  "a long line": (b'{"text": "' + b"x" * 3000_000 + b'"}', "is longer than 2,000,000 bytes"),
  "a number that is large": (b'{"text": "n", "n": 123456789012345678901234567890}', None),
  "an exponent that is large": (b'{"text": "n", "n": 1e999}', None),
  "carriage return": (b'{"text": "n"}\r', None),
  "a blank line": (b" \t\r", None),
  "an escaped surrogate": (b'{"text": "\\ud800"}', None),
}


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_bad_line_is_rejected_with_its_number_and_the_others_are_read(read, tmp_path, case, suffix):
  line, expected = LINES[case]
  content = GOOD + line + b"\n" + GOOD
  (tmp_path / f"a{suffix}").write_bytes(zst(content) if suffix.endswith("zst") else content)
  reading = read(f"jsonl:{tmp_path}/a{suffix}", max_record_bytes=2_000_000)
  assert [record.where for record in reading.records if record.fields.get("text") == "good"] == [
    f"a{suffix}:1",
    f"a{suffix}:3",
  ]
  if expected is None:
    assert not reading.rejects
    return
  (reject,) = reading.rejects
  assert reject.where == f"a{suffix}:2"
  assert reject.reason.startswith(expected)
  assert len(f"{reject.where}: {reject.reason}") <= 200
  assert reject.reason.isprintable()
  assert len(reject.excerpt) <= 200


def files(tmp_path):
  """Returns {name: (source, file name, contents, what the error says)} of files that are refused as a whole."""
  rows, records = parquet(tmp_path), array_record(tmp_path)
  packed, lines = zst(GOOD * 1000), gzip.compress(GOOD * 1000)
  return {
    "gz cut short": ("jsonl", "a.jsonl.gz", lines[:-9], "Truncated"),
    "gz without its end": ("jsonl", "a.jsonl.gz", lines[:-1], "Truncated"),
    "gz with a wrong sum": ("jsonl", "a.jsonl.gz", lines[:-8] + bytes(4) + lines[-4:], "incorrect data check"),
    "gz that is none": ("jsonl", "a.jsonl.gz", GOOD, "incorrect header"),
    "gz and then none": ("jsonl", "a.jsonl.gz", lines + GOOD, "inflate failed"),
    "zst cut short": ("jsonl", "a.jsonl.zst", packed[:-5], "Truncated"),
    "zst that is none": ("jsonl", "a.jsonl.zst", GOOD, "ZSTD decompress failed"),
    "text in a gz cut short": ("text", "a.txt.gz", lines[:-9], "Truncated"),
    "no line end": ("jsonl", "a.jsonl", b"x" * 40_000_000, "it is not JSONL"),
    "no line end in gz": ("jsonl", "a.jsonl.gz", gzip.compress(bytes(40_000_000), 1), "it is not JSONL"),
    "list cut short": ("jsonl", "a.json", b'[{"text": "a"}, {"te', "is not JSON"),
    "list without its end": ("jsonl", "a.json", b'[{"text": "a"}', "ends within its list"),
    "list that goes on": ("jsonl", "a.json", b"[{}] {}", "goes on after the end"),
    "list of bad utf-8": ("jsonl", "a.json", b'[{"text": "\xff"}]', "is not UTF-8"),
    "deep list": ("jsonl", "a.json", b"[" * 200_000, "is nested too deeply"),
    "list with NaN": ("jsonl", "a.json", b'[{"a": NaN}]', "holds NaN"),
    "parquet cut short": ("parquet", "a.parquet", rows[:-100], "no readable Parquet"),
    "parquet without its start": ("parquet", "a.parquet", rows[100:], "no readable Parquet"),
    "parquet with a damaged page": ("parquet", "a.parquet", damaged(rows, 4), "no readable Parquet"),
    "parquet that is none": ("parquet", "a.parquet", GOOD, "no readable Parquet"),
    "array record cut short": ("arrayrecord", "a.array_record", records[:70_000], "no readable ArrayRecord"),
    "array record of half a block": ("arrayrecord", "a.array_record", records[:-1000], "no readable ArrayRecord"),
    "array record damaged": ("arrayrecord", "a.array_record", damaged(records, 3000), "ArrayRecord"),
    "array record that is none": ("arrayrecord", "a.array_record", GOOD * 9000, "no readable ArrayRecord"),
    "empty lines": ("jsonl", "a.jsonl", b"", "1 empty files"),
    "empty parquet": ("parquet", "a.parquet", b"", "empty files"),
    "empty array record": ("arrayrecord", "a.array_record", b"", "empty files"),
    "empty text": ("text", "a.txt", b"", "empty files"),
    "a folder of other files": ("parquet", "a.txt", b"text", "names no file"),
    "not prepared": ("tfds", "a.txt", b"text", "holds no dataset_info.json"),
  }  # fmt: skip


CASES = [
  "gz cut short", "gz without its end", "gz with a wrong sum", "gz that is none", "gz and then none", "zst cut short",
  "zst that is none", "text in a gz cut short", "no line end", "no line end in gz", "list cut short",
  "list without its end", "list that goes on", "list of bad utf-8", "deep list", "list with NaN", "parquet cut short",
  "parquet without its start", "parquet with a damaged page", "parquet that is none", "array record cut short",
  "array record of half a block", "array record damaged", "array record that is none", "empty lines", "empty parquet",
  "empty array record", "empty text", "a folder of other files", "not prepared",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_cannot_be_read_is_a_data_error_of_one_line(read, tmp_path_factory, case):
  source, name, content, expected = files(tmp_path_factory.mktemp("whole"))[case]
  folder = tmp_path_factory.mktemp("damaged \n folder")
  (folder / name).write_bytes(content)
  with pytest.raises(DataError, match=expected) as error:
    read(f"{source}:{folder}", max_record_bytes=2_000_000)
  assert str(error.value).isprintable()


def test_every_case_is_tried(tmp_path):
  assert set(CASES) == set(files(tmp_path))
  assert len(CASES) + len(LINES) >= 60


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "arrayrecord"])
def test_a_file_that_may_not_be_read_is_a_data_error(read, tmp_path, source, monkeypatch):
  name = {"text": "a.txt", "jsonl": "a.jsonl", "parquet": "a.parquet", "arrayrecord": "a.array_record"}[source]
  (tmp_path / name).write_bytes(GOOD)
  (tmp_path / name).chmod(0)
  if os.geteuid() == 0:  # to whom nothing is forbidden
    real = open

    def forbidden(path, *args, **options):
      if str(path).startswith(str(tmp_path)):
        raise PermissionError(13, "Permission denied")
      return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", forbidden)
  with pytest.raises(DataError, match="Permission denied; make it readable"):
    read(f"{source}:{tmp_path}")


def test_an_item_of_a_list_that_is_no_object_is_rejected_alone(read, tmp_path):
  (tmp_path / "a.json").write_text('[{"text": "a"}, 5, "b", null, {"text": "c"}]')
  reading = read(f"jsonl:{tmp_path}")
  assert reading.fields() == ["a", "c"]
  assert [reject.where for reject in reading.rejects] == ["a.json#1", "a.json#2", "a.json#3"]


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "arrayrecord", "tfds"])
def test_a_source_without_an_argument_is_a_config_error(read, source):
  with pytest.raises(ConfigError, match="lacks a path"):
    read(source)


HOSTILE = {
  "a line of 100 MB": ("a.jsonl", "GOOD + b'{\"text\": \"' + b'x' * 100_000_000 + b'\"}\\n' + GOOD", 2),
  "a line of 30 MB": ("a.jsonl", "GOOD + ('{\"text\": \"' + '\U0001f600' * 7_500_000 + '\"}\\n').encode()", 2),
  "30 MB of lists": ("a.jsonl", "GOOD + b'{\"a\": [' + b'[],' * 10_000_000 + b'1]}\\n' + GOOD", 2),
  "30 MB of keys": ("a.jsonl", "b'{' + b','.join(b'\"%07d\":1' % i for i in range(2_800_000)) + b'}\\n' + GOOD", 1),
  "a gz of one line": ("a.jsonl.gz", "gzip.compress(bytes(16_000_000)) * 80", -1),
  "a zst of one line": ("a.jsonl.zst", "pyarrow.compress(bytes(16_000_000), codec='zstd', asbytes=True) * 80", -1),
  "a gz of white space": ("a.jsonl.gz", "gzip.compress(b' ' * 16_000_000) * 80", -1),
  "a list of one item": ("a.json", "b'[\"' + b'x' * 200_000_000", -1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_large_entries_take_neither_long_nor_much_memory(tmp_path, case):
  name, content, num_records = HOSTILE[case]
  prepare = f"import gzip, pyarrow; GOOD = {GOOD!r}; open({str(tmp_path / name)!r}, 'wb').write({content})"
  subprocess.run([sys.executable, "-c", prepare], check=True, timeout=120)
  program = f"""
import re, time
from pathlib import Path
from ultrathink_jax.data.documents import Record
from ultrathink_jax.data.sources import SourceOptions, find_corpus
from ultrathink_jax.errors import DataError
start = time.process_time()
num_records = 0
try:
  for shards in find_corpus("jsonl:{tmp_path}", SourceOptions(), Path("."), print).open().values():
    for shard in shards:
      for entry in shard.read():
        num_records += isinstance(entry, Record)
        del entry
except DataError as error:
  assert len(str(error).splitlines()) == 1
  num_records = -1
kibibytes = int(re.search("VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text()).group(1))
print(num_records, kibibytes // 1024, time.process_time() - start)
"""
  out = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True)
  found, mebibytes, seconds = out.stdout.split()
  assert int(found) == num_records
  assert int(mebibytes) < 1024
  assert float(seconds) < 10
