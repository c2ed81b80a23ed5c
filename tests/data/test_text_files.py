"""Text is found by path, folder or glob, checked, and cut where it is large."""

from pathlib import Path

import pytest

from ultrathink_jax.config import DataConfig
from ultrathink_jax.data import text_files
from ultrathink_jax.errors import ConfigError, DataError


def open_text(path, fraction=0.3, log=lambda message: None):
  config = DataConfig(f"text:{path}", "auto", fraction)
  return text_files.text_corpus(str(path), config, 512, Path("unused"), log).open()


def names(splits):
  return {part[i].name for part in (splits.train, splits.validation) for i in range(len(part))}


def texts_in_order(splits):
  documents = [part[i] for part in (splits.train, splits.validation) for i in range(len(part))]
  return [text for text, name in sorted(documents, key=lambda d: int(d.name.split("#")[1]))]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "a.txt").write_text("one")
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "b.py").write_bytes(b"two\r\n")
  (tmp_path / "empty").touch()
  (tmp_path / ".hidden").write_text("never")
  return tmp_path


def test_a_folder_gives_its_files_and_those_below(folder):
  assert names(open_text(folder)) == {"a.txt", "sub/b.py"}


def test_a_glob_gives_what_it_matches(folder):
  (folder / "sub" / "c.py").write_text("three")
  assert names(open_text(f"{folder}/**/*.py")) == {"b.py", "c.py"}


def test_text_is_read_byte_for_byte(folder):
  splits = open_text(folder)
  assert "two\r\n" in {part[0].text for part in (splits.train, splits.validation)}


def test_a_missing_path_is_named(tmp_path):
  with pytest.raises(DataError, match=str(tmp_path / "nowhere")):
    open_text(tmp_path / "nowhere")


def test_a_source_without_a_path_is_refused():
  with pytest.raises(ConfigError, match="text:PATH"):
    open_text("")


def test_files_that_are_not_utf8_are_skipped_counted_and_reported_once(folder, messages):
  (folder / "latin.txt").write_bytes("käse".encode("latin-1"))
  (folder / "cut.txt").write_bytes("ä".encode()[:1])
  splits = open_text(folder, log=messages.append)
  assert splits.num_skipped == 2
  assert names(splits) == {"a.txt", "sub/b.py"}
  assert messages == ["data: skipped 2 of 5 files that are not UTF-8 text, the first is cut.txt"]


def test_a_folder_without_text_is_a_data_error(tmp_path):
  (tmp_path / "image").write_bytes(b"\xff\xd8")
  with pytest.raises(DataError, match="holds no text"):
    open_text(tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    "line of text\n" * 9 + "\n" + "paragraph\r\n\r\n" * 5000,
    "no blank line but lines\n" * 5000,
    "ä漢😀" * 20_000,
    "tiny\n\ntext",
  ],
)
def test_a_single_file_is_cut_into_documents_that_join_to_it(tmp_path, text):
  path = tmp_path / "single.txt"
  path.write_bytes(text.encode())
  splits = open_text(path)
  assert len(splits.train)
  assert len(splits.validation)
  texts = texts_in_order(splits)
  assert "".join(texts) == text
  assert max(len(piece.encode()) for piece in texts) <= 5 * 16 * 1024


def test_a_cut_prefers_blank_lines(tmp_path):
  path = tmp_path / "single.txt"
  path.write_text(("x = 1\n" * 50 + "\n") * 400)
  assert all(text.endswith("\n\n") for text in texts_in_order(open_text(path)))


def test_only_large_files_of_many_are_cut(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, "_WHOLE_FILE_BYTES", 50_000)
  (tmp_path / "small.txt").write_text("small\n\n" * 5000)
  (tmp_path / "large.txt").write_text("large\n\n" * 10_000)
  found = names(open_text(tmp_path))
  assert "small.txt" in found
  assert "large.txt#3" in found


def test_the_identity_changes_with_the_files(folder):
  def identity():
    return text_files.text_corpus(str(folder), DataConfig(f"text:{folder}", "auto", 0.1), 512, folder, print).identity

  before = identity()
  assert identity() == before
  (folder / "a.txt").write_text("one more")
  assert identity() != before
