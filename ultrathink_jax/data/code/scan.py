"""The files of a source tree: those to read, and for every other one the reason why it is left out."""

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pathspec

from ultrathink_jax.data.code.languages import language_name
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.wording import printable
from ultrathink_jax.errors import ConfigError, DataError

_VERSION_CONTROL = {".git", ".hg", ".svn", ".jj"}  # holds the tree's history, is no part of it
_GENERATED_NAMES = (
  "*.gen.*", "*.generated.*", "*_generated.*", "*.pb.go", "*.pb.h", "*.pb.cc", "*_pb2.py", "*_pb2_grpc.py",
  "*.min.js", "*.min.css", "*.map", "*.g.dart",
)  # fmt: skip
_LOCK_NAMES = (
  "*.lock", "*.lockb", "package-lock.json", "npm-shrinkwrap.json", "pnpm-lock.yaml", "go.sum", "Gemfile.lock",
)  # fmt: skip
_MAX_IGNORE_BYTES = 1024 * 1024


class Found(NamedTuple):
  """A regular file to read; `path` is as on disk, relative to the root, with slashes."""

  path: str
  num_bytes: int
  mtime_ns: int

  @property
  def name(self) -> str:
    """The path in printable characters, by which everything that is written calls the file."""
    return printable(self.path)


class LeftOut(NamedTuple):
  """A file that is not read, or all files below a folder."""

  name: str
  reason: str
  num_files: int = 1


class _Folder(NamedTuple):
  """A folder to enter; `ignores` has the ignore files down to it, each with the length of the path of its folder."""

  path: str
  ignores: tuple[tuple[int, pathspec.GitIgnoreSpec], ...]


def scan(root: Path, options: CodeOptions, skipped: Collection[Path] = ()) -> tuple[list[Found], list[LeftOut]]:
  """Returns the files to read and those left out, both sorted; what is below `skipped` is no part of the tree.

  Symbolic links are not followed: what they name is in the tree by itself, or no part of it.

  Raises:
    ConfigError: a pattern of `options.exclude` is not one.
    DataError: the root is no folder that can be read.
  """
  if not root.is_dir():
    raise DataError(f"code:{root} is not a folder; give the root of a source tree")
  if not os.access(root, os.R_OK | os.X_OK):
    raise DataError(f"code:{root} cannot be read; make it readable")
  rules = _exclusions(options)
  found, left_out = [], []
  folders = [_Folder("", ())]
  while folders:
    folder = folders.pop()
    try:
      entries = _entries(root / folder.path)
    except OSError:
      left_out.append(LeftOut(printable(folder.path), "unreadable folder"))
      continue
    ignores = folder.ignores
    if options.use_gitignore and any(entry.name == ".gitignore" for entry in entries):
      ignores += ((len(folder.path), _read_ignore_file(root / folder.path / ".gitignore")),)
    for entry in entries:
      path = folder.path + entry.name
      if entry.name in _VERSION_CONTROL or Path(entry.path) in skipped:
        continue
      is_folder = entry.is_dir(follow_symlinks=False)
      reason = _reason(path + "/" * is_folder, entry, ignores, rules, options)
      if reason:
        count = _count_files(entry.path) if is_folder else 1
        left_out += [LeftOut(printable(path) + "/" * is_folder, reason, count)] if count else []
      elif is_folder:
        folders.append(_Folder(path + "/", ignores))
      else:
        _add_file(path, entry, options, found, left_out)
  return sorted(found, key=lambda file: os.fsencode(file.path)), sorted(left_out)


def _patterns(lines: Iterable[str]) -> pathspec.GitIgnoreSpec:
  # The engine that is always there, because others, used where they are installed, refuse names that are not UTF-8.
  return pathspec.GitIgnoreSpec.from_lines(lines, backend="simple")


def _entries(folder: Path) -> list[os.DirEntry]:
  with os.scandir(folder) as entries:
    return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def _exclusions(options: CodeOptions) -> list[tuple[str, pathspec.GitIgnoreSpec]]:
  try:
    patterns = _patterns(options.exclude)
  except (ValueError, re.error) as error:
    raise ConfigError(f"code option exclude={options.exclude!r} has a bad pattern: {error}") from error
  return [
    ("excluded path", patterns),
    ("generated", _patterns(_GENERATED_NAMES)),
    ("lock file", _patterns(_LOCK_NAMES)),
  ]


def _reason(
  path: str,
  entry: os.DirEntry,
  ignores: Sequence[tuple[int, pathspec.GitIgnoreSpec]],
  rules: Sequence[tuple[str, pathspec.GitIgnoreSpec]],
  options: CodeOptions,
) -> str | None:
  """Returns why a path is left out without a look at what is there; that of a folder ends in a slash."""
  if entry.is_symlink():
    return "symbolic link"
  if entry.name.startswith("."):
    return "hidden"
  for length, ignore in reversed(ignores):  # the innermost file that says something decides
    is_ignored = ignore.check_file(path[length:]).include
    if is_ignored is not None:
      if is_ignored:
        return "ignored by .gitignore"
      break
  for reason, patterns in rules:
    if patterns.match_file(path):
      return reason
  if options.languages and not path.endswith("/") and language_name(path) not in options.languages:
    return "language"
  return None


def _add_file(path: str, entry: os.DirEntry, options: CodeOptions, found: list[Found], left_out: list[LeftOut]) -> None:
  try:
    status = entry.stat(follow_symlinks=False)
  except OSError:
    left_out.append(LeftOut(printable(path), "unreadable"))
    return
  if not stat.S_ISREG(status.st_mode):
    left_out.append(LeftOut(printable(path), "not a regular file"))
  elif not status.st_size:
    left_out.append(LeftOut(printable(path), "empty"))
  elif status.st_size > options.max_file_bytes:
    left_out.append(LeftOut(printable(path), "too large"))
  else:
    found.append(Found(path, status.st_size, status.st_mtime_ns))


def _count_files(folder: str) -> int:
  """Returns how many files, links and devices are below a folder; a folder that cannot be read counts as one."""
  count, folders = 0, [folder]
  while folders:
    try:
      with os.scandir(folders.pop()) as entries:
        for entry in entries:
          if entry.is_dir(follow_symlinks=False):
            folders += [entry.path] if entry.name not in _VERSION_CONTROL else []
          else:
            count += 1
    except OSError:
      count += 1
  return count


def _read_ignore_file(path: Path) -> pathspec.GitIgnoreSpec:
  """Returns the patterns of an ignore file without those that are none, as git does."""
  try:
    if not path.is_file():
      return _patterns([])
    with open(path, "rb") as file:
      text = file.read(_MAX_IGNORE_BYTES).decode("utf-8-sig", "surrogateescape")
  except OSError:
    return _patterns([])
  return _patterns(_valid_patterns(text.splitlines()))


def _valid_patterns(lines: Sequence[str]) -> Iterator[str]:
  for line in lines:
    try:
      _patterns([line])
    except (ValueError, re.error):
      continue
    yield line
