"""Files are found by path, folder, glob, list or URL, under names that are the same on every machine."""

import importlib.util
import os
import shutil

import fsspec
import pytest

from ultrathink_jax.data.sources.files import find_files
from ultrathink_jax.errors import ConfigError, DataError


def find(argument, log=lambda message: None, suffixes=""):
  return find_files(str(argument), "text", log, suffixes)


def names(argument, **options):
  return [file.name for file in find(argument, **options).files]


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "root"
  (root / "sub" / "deep").mkdir(parents=True)
  (root / ".git").mkdir()
  for name in ("a.txt", "b.json", "sub/c.txt", "sub/deep/d.txt", ".hidden.txt", ".git/e.txt"):
    (root / name).write_text(name)
  return root


def test_a_folder_gives_all_files_below_that_are_not_hidden(folder):
  assert names(folder) == ["a.txt", "b.json", "sub/c.txt", "sub/deep/d.txt"]


def test_a_folder_is_searched_for_the_suffixes_of_a_source(folder):
  assert names(folder, suffixes=r"\.json$") == ["b.json"]


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    ("*.txt", ["a.txt"]),
    ("**/*.txt", ["a.txt", "sub/c.txt", "sub/deep/d.txt"]),
    ("sub/**", ["c.txt", "deep/d.txt"]),
    ("s*/[c].txt", ["sub/c.txt"]),
    (".git/*", ["e.txt"]),
    (".*.txt", [".hidden.txt"]),
  ],
)
def test_a_glob_gives_what_it_matches_named_from_its_fixed_part(folder, pattern, expected):
  assert names(f"{folder}/{pattern}") == expected


def test_names_do_not_depend_on_which_files_a_glob_happens_to_match(folder):
  before = names(f"{folder}/**/d.txt")
  (folder / "d.txt").touch()
  assert set(before) < set(names(f"{folder}/**/d.txt"))


def test_a_list_is_named_from_what_its_items_have_in_common(folder):
  assert names(f"{folder}/sub/c.txt, {folder}/sub/deep/*.txt") == ["c.txt", "deep/d.txt"]
  assert names(f"{folder}/a.txt,{folder}/sub") == ["a.txt", "sub/c.txt", "sub/deep/d.txt"]


def test_a_file_that_is_named_twice_is_found_once(folder):
  assert names(f"{folder}/a.txt,{folder}/*.txt") == ["a.txt"]


def test_names_and_identity_are_the_same_wherever_the_folder_lies(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
  here, there = find(folder), find(tmp_path / "elsewhere" / "copy")
  assert [file.name for file in here.files] == [file.name for file in there.files]
  assert here.identity("x") == there.identity("x")
  assert here.identity("x") != here.identity("y")


@pytest.mark.parametrize("change", ["size", "time", "name"])
def test_the_identity_changes_with_the_files(folder, change):
  before = find(folder).identity()
  if change == "size":
    (folder / "a.txt").write_text("longer than it was")
  elif change == "time":
    os.utime(folder / "a.txt", (1, 1))
  else:
    (folder / "a.txt").rename(folder / "z.txt")
  assert find(folder).identity() != before


@pytest.mark.parametrize(
  "name", ["with space.txt", "😀.txt", "two\nlines.txt", "a,b.txt", "[a].txt", "tab\t.txt", "back\\slash"]
)
def test_any_name_is_found_and_written_on_one_line(tmp_path, name):
  (tmp_path / name).write_text("text")
  (tmp_path / "other").write_text("text")
  (file,) = find(tmp_path / name).files
  assert file.path == str(tmp_path / name)
  assert file.name.isprintable()
  assert file.name in names(tmp_path)


def test_names_that_look_alike_when_written_stay_different(tmp_path):
  for name in ("a\nb", "a\\nb"):
    (tmp_path / name).write_text("text")
  assert len(set(names(tmp_path))) == 2


def test_a_name_that_is_not_utf8_is_found(tmp_path):
  path = os.path.join(os.fsencode(tmp_path), b"\xff.txt")
  with open(path, "w") as file:
    file.write("text")
  assert names(tmp_path) == ["\\udcff.txt"]
  assert find(tmp_path).identity()


def test_links_to_folders_are_not_followed_and_reported_once(folder):
  (folder / "loop").symlink_to(folder)
  (folder / "up").symlink_to(folder / "sub")
  messages = []
  assert names(folder, log=messages.append) == ["a.txt", "b.json", "sub/c.txt", "sub/deep/d.txt"]
  assert len(messages) == 1
  assert "2 links" in messages[0]
  assert names(f"{folder}/**/*.txt") == ["a.txt", "sub/c.txt", "sub/deep/d.txt"]


def test_what_is_no_file_in_a_folder_is_an_entry_that_is_refused(folder):
  (folder / "dangling").symlink_to(folder / "nowhere")
  (folder / "loop").symlink_to(folder / "loop")
  os.mkfifo(folder / "pipe")
  found = find(folder)
  reasons = {refused.name: refused.reason for refused in found.refused}
  assert reasons == {
    "dangling": "is a link to nothing",
    "loop": "is a link that leads back to itself",
    "pipe": "is a pipe, a socket or a device, not a file",
  }
  assert len(found.files) == 4


@pytest.mark.parametrize("name", ["nowhere", "dangling", "loop", "pipe", "x" * 300, "nul\0", "nowhere/*.txt"])
def test_a_path_that_is_no_file_is_a_data_error_of_one_line(tmp_path, name):
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(DataError) as error:
    find(tmp_path / name)
  assert "\n" not in str(error.value)
  assert "\0" not in str(error.value)


@pytest.mark.parametrize("argument", ["", ",", "a.txt,,b.txt"])
def test_an_argument_without_a_path_is_a_config_error(argument):
  with pytest.raises(ConfigError, match="lacks a path"):
    find(argument)


def test_a_folder_without_files_or_with_empty_ones_only_is_a_data_error(tmp_path):
  with pytest.raises(DataError, match="names no file"):
    find(tmp_path)
  (tmp_path / "empty").touch()
  with pytest.raises(DataError, match="1 empty files"):
    find(tmp_path)


@pytest.fixture
def remote():
  system = fsspec.filesystem("memory")
  for name in ("a.txt", "sub/b.txt", ".hidden/c.txt"):
    system.pipe(f"/finding/{name}", name.encode())
  yield "memory://finding"
  system.rm("/finding", recursive=True)


def test_files_behind_a_url_are_found_as_local_ones(remote):
  assert names(remote) == ["a.txt", "sub/b.txt"]
  assert names(f"{remote}/a.txt") == ["a.txt"]
  assert names(f"{remote}/**/b.txt") == ["sub/b.txt"]


def test_the_identity_of_remote_files_changes_when_they_are_written(remote):
  before = find(remote).identity()
  assert find(remote).identity() == before
  fsspec.filesystem("memory").pipe("/finding/a.txt", b"other")
  assert find(remote).identity() != before


@pytest.mark.parametrize("url", ["memory://nowhere/a.txt", "nosuch://x/y", "s3://bucket/x"])
def test_a_url_that_cannot_be_read_is_a_data_error_of_one_line(url):
  if url.startswith("s3") and importlib.util.find_spec("s3fs"):
    pytest.skip("s3fs is installed, and would look for the network")
  with pytest.raises(DataError, match="cannot be read"):
    find(url)
