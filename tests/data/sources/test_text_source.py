"""Text files become documents: whole, or in pieces that join to the file."""

import codecs
import gzip

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.sources import text
from ultrathink_jax.data.sources.text import cut


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "a.txt").write_text("one")
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "b.py").write_bytes(b"two\r\n")
  (tmp_path / "empty").touch()
  return tmp_path


def test_every_file_of_a_folder_is_a_document_byte_for_byte(read, folder):
  reading = read(f"text:{folder}")
  assert {entry.where: entry.fields["text"] for entry in reading.entries} == {"a.txt": "one", "sub/b.py": "two\r\n"}


def test_the_text_is_found_under_the_field_that_is_asked_for(read, folder):
  assert sorted(read(f"text:{folder}", text_field="content").fields("content")) == ["one", "two\r\n"]


def test_files_that_are_no_text_are_rejected_and_the_others_read(read, folder):
  (folder / "latin.txt").write_bytes("käse".encode("latin-1"))
  (folder / "cut.txt").write_bytes("ä".encode()[:1])
  (folder / "image").write_bytes(b"GIF\0\0")
  reading = read(f"text:{folder}")
  assert {reject.where: reject.reason for reject in reading.rejects} == {
    "latin.txt": "is not UTF-8 text: byte 0xe4 at position 1",
    "cut.txt": "is not UTF-8 text: byte 0xc3 at position 0",
    "image": "holds NUL bytes, so it is no text",
  }
  assert len(reading.records) == 2


def test_a_byte_order_mark_is_left_out(read, folder):
  (folder / "mark.txt").write_bytes(codecs.BOM_UTF8 + b"text")
  assert "text" in read(f"text:{folder}").fields()


@pytest.mark.parametrize(
  "content",
  [
    "line of text\n" * 9 + "\n" + "paragraph\r\n\r\n" * 5000,
    "no blank line but lines\n" * 5000,
    "ä漢😀" * 20_000,
    "tiny\n\ntext",
  ],
)
def test_a_single_file_is_cut_into_documents_that_join_to_it(read, tmp_path, content):
  path = tmp_path / "single.txt"
  path.write_bytes(content.encode())
  reading = read(f"text:{path}")
  assert "".join(reading.fields()) == content
  assert len(reading.records) >= 2
  assert max(len(piece.encode()) for piece in reading.fields()) <= 5 * 16 * 1024
  for record in reading.records:
    offset = int(record.where.removeprefix("single.txt#"))
    assert content.encode()[offset:].decode().startswith(record.fields["text"])


def test_a_cut_prefers_blank_lines(read, tmp_path):
  path = tmp_path / "single.txt"
  path.write_text(("x = 1\n" * 50 + "\n") * 400)
  assert all(piece.endswith("\n\n") for piece in read(f"text:{path}").fields())


def test_only_large_files_of_many_are_cut(read, tmp_path, monkeypatch):
  monkeypatch.setattr(text, "_WHOLE_FILE_BYTES", 50_000)
  (tmp_path / "small.txt").write_text("small\n\n" * 5000)
  (tmp_path / "large.txt").write_text("large\n\n" * 10_000)
  found = read(f"text:{tmp_path}").names
  assert "small.txt" in found
  assert "large.txt#0" in found


def test_a_large_file_has_the_same_text_in_many_shards(read, tmp_path, monkeypatch):
  content = "".join(f"paragraph {i}\n" * (i % 7) + "\n" for i in range(30_000))
  path = tmp_path / "large.txt"
  path.write_text(content)
  monkeypatch.setattr(text, "_SHARD_BYTES", 150_000)
  reading = read(f"text:{path}")
  assert len(reading.shards) > 5
  assert "".join(reading.fields()) == content
  assert len(set(reading.names)) == len(reading.names)
  assert len({shard.name for shard in reading.shards}) == len(reading.shards)
  assert sum(shard.num_bytes for shard in reading.shards) == len(content)


def test_one_bad_piece_of_a_large_file_does_not_lose_the_others(read, tmp_path):
  path = tmp_path / "large.txt"
  path.write_bytes(b"paragraph\n\n" * 50_000 + b"\xff\n\n" + b"paragraph\n\n" * 50_000)
  reading = read(f"text:{path}")
  assert len(reading.rejects) == 1
  assert reading.rejects[0].reason == "is not UTF-8 text: byte 0xff at position 550000"
  assert len(reading.records) > 50


def test_a_large_file_that_is_no_text_is_rejected_once(read, tmp_path):
  path = tmp_path / "large.bin"
  path.write_bytes(b"\x7fELF\0" + b"text\n" * 300_000)
  assert len(read(f"text:{path}").entries) == 1


def test_a_compressed_text_reads_as_the_text(read, tmp_path):
  content = "paragraph\n\n" * 10_000
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
  reading = read(f"text:{tmp_path}/a.txt.gz")
  assert "".join(reading.fields()) == content
  assert len(reading.records) > 3


def test_a_remote_text_reads_as_the_local_one(read, tmp_path, monkeypatch):
  monkeypatch.setattr(text, "_SHARD_BYTES", 300_000)
  content = "ä paragraph\n\n" * 150_000
  (tmp_path / "a.txt").write_text(content)
  fsspec.filesystem("memory").pipe("/texts/a.txt", content.encode())
  assert read("text:memory://texts").entries == read(f"text:{tmp_path}").entries


@given(
  content=st.one_of(
    st.binary(max_size=400),
    st.text("a\n \té漢", max_size=300).map(str.encode),
  ),
  piece_bytes=st.integers(1, 40),
  sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_text_however_it_comes_in_blocks(content, piece_bytes, sizes):
  blocks, start = [], 0
  while start < len(content):
    blocks.append(content[start : start + sizes[len(blocks) % len(sizes)]])
    start += len(blocks[-1])
  pieces = list(cut(blocks, piece_bytes))
  assert pieces == list(cut([content], piece_bytes))
  assert b"".join(piece for _, piece in pieces) == content
  assert all(content[offset:].startswith(piece) for offset, piece in pieces)
  assert all(piece_bytes <= len(piece) <= 5 * piece_bytes for _, piece in pieces[:-1])
  try:
    content.decode()
  except UnicodeDecodeError:
    return
  for _, piece in pieces:
    piece.decode()
