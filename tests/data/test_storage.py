"""Directories are whole or absent."""

import multiprocessing
import os

import pytest

from ultrathink_jax.data.storage import lock, read_manifest, write_directory
from ultrathink_jax.errors import DataError


def write_content(text):
  def write(path):
    (path / "content").write_text(text)
    return {"size": len(text)}

  return write


def test_a_finished_directory_is_found_under_its_key_only(tmp_path):
  write_directory(tmp_path / "store", "key", write_content("one"))
  assert read_manifest(tmp_path / "store", "key") == {"key": "key", "size": 3}
  assert read_manifest(tmp_path / "store", "other") is None


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
  def fail(path):
    (path / "content").write_text("half")
    raise OSError("disk full")

  write_directory(tmp_path / "store", "old", write_content("old"))
  with pytest.raises(OSError, match="disk full"):
    write_directory(tmp_path / "store", "new", fail)
  assert (tmp_path / "store" / "content").read_text() == "old"
  assert read_manifest(tmp_path / "store", "new") is None


def _die_while_writing(directory):
  def die(path):
    (path / "content").write_text("half")
    os.kill(os.getpid(), 9)

  with lock(directory, print):
    write_directory(directory / "store", "key", die)


def test_a_killed_writer_leaves_nothing_and_no_lock(tmp_path):
  process = multiprocessing.get_context("spawn").Process(target=_die_while_writing, args=(tmp_path,))
  process.start()
  process.join()
  assert process.exitcode == -9
  assert not (tmp_path / "store").exists()
  with lock(tmp_path, print):
    write_directory(tmp_path / "store", "key", write_content("whole"))
  assert sorted(os.listdir(tmp_path)) == [".lock", "store"]
  assert (tmp_path / "store" / "content").read_text() == "whole"


def test_a_directory_that_cannot_be_made_is_a_data_error(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(DataError, match="cannot be written"), lock(tmp_path / "file" / "data", print):
    pass
