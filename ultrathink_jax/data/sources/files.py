"""The files that PATH names: a file, a folder, a glob or a comma-separated list of them, here or behind a URL.

Folders give all files below except hidden ones; links to folders are not followed, so that no loop can catch the
search. Names are relative to what the items of PATH have in common, hence the same on every machine.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.data.documents import Reject
from ultrathink_jax.data.wording import in_short, printable
from ultrathink_jax.errors import ConfigError, DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[a-z0-9+.-]+)*://")
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


class File(NamedTuple):
  """A file to read: `size` is -1 where unknown, `stamp` differs whenever the contents do."""

  name: str
  path: str
  size: int
  stamp: str


class Refused(NamedTuple):
  """An entry of a folder that cannot be read, as a shard of one rejected entry."""

  name: str
  reason: str

  @property
  def num_bytes(self) -> int:
    return 0

  def read(self) -> Iterator[Reject]:
    yield Reject(self.name, self.reason)


class Found(NamedTuple):
  """Sorted by name; at least one file that is not empty."""

  files: list[File]
  refused: list[Refused]

  def identity(self, *settings: object) -> str:
    """Returns a hash of the names, sizes and stamps of the files and of the settings they are read with."""
    lines = [repr(settings), *(f"{name}\0{size}\0{stamp}" for name, _, size, stamp in self.files)]
    lines += [f"{name}\0{reason}" for name, reason in self.refused]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


class _Entry(NamedTuple):
  """Something found, before it has a name: a file, or the reason why it cannot be one."""

  path: str
  size: int = 0
  stamp: str = ""
  reason: str = ""


def is_url(path: str) -> bool:
  return _URL.match(path) is not None


def find_files(argument: str, kind: str, log: Callable[[str], None], suffixes: str = "") -> Found:
  """Returns the files that the argument of a source names; from folders those whose names match `suffixes`.

  Raises:
    ConfigError: there is no argument.
    DataError: there is no such file, none that is not empty, or one that cannot be read.
  """
  source = printable(f"{kind}:{argument}")
  is_one = is_url(argument) or os.path.lexists(os.path.expanduser(argument))
  items = [argument] if is_one else [item.strip() for item in argument.split(",")]
  if not all(items):
    raise ConfigError(f"source {source!r} lacks a path; write {kind}:PATH, a file, a folder, a glob or a list a,b")
  pattern = re.compile(suffixes)
  bases, entries = [], []
  for item in items:
    base, found = (_find_remote if is_url(item) else _find_local)(item, pattern, log)
    if not found:
      raise DataError(f"source {source!r} names no file; check that {printable(item)} exists and holds such files")
    bases.append(base.rstrip("/").split("/"))
    entries += found
  depth = next((i for i, parts in enumerate(zip(*bases, strict=False)) if len(set(parts)) > 1), min(map(len, bases)))
  named = {printable("/".join(entry.path.split("/")[depth:])): entry for entry in entries}
  files = [File(name, *entry[:3]) for name, entry in sorted(named.items()) if not entry.reason]
  refused = [Refused(name, entry.reason) for name, entry in sorted(named.items()) if entry.reason]
  if not refused and not any(file.size for file in files):
    raise DataError(f"source {source!r} holds nothing: {len(files)} empty files; check that they were written")
  return Found(files, refused)


def _find_local(item: str, suffixes: re.Pattern[str], log: Callable[[str], None]) -> tuple[str, list[_Entry]]:
  """Returns the folder that names are relative to, and what is found."""
  path = os.path.abspath(os.path.expanduser(item))
  entry = _look(path)
  if not isinstance(entry, _Entry):
    return path, list(_walk(path, suffixes, log))
  if entry.reason and glob.has_magic(item) and not os.path.lexists(path):
    return _match(path)
  if entry.reason:
    raise DataError(f"{printable(item)} {entry.reason}; name a file, a folder or a glob")
  return os.path.dirname(path), [entry]


def _look(path: str) -> _Entry | None:
  """Returns what can be known of a path without opening it; None for a folder."""
  try:
    status = os.stat(path)
  except OSError as error:
    if error.errno == errno.ELOOP:
      return _Entry(path, reason="is a link that leads back to itself")
    if os.path.islink(path):
      return _Entry(path, reason="is a link to nothing")
    return _Entry(path, reason=f"cannot be read: {(error.strerror or str(error)).lower()}")
  except ValueError:
    return _Entry(path, reason="cannot be read: there is a NUL character in its name")
  if stat.S_ISDIR(status.st_mode):
    return None
  if not stat.S_ISREG(status.st_mode):
    return _Entry(path, reason="is a pipe, a socket or a device, not a file")
  return _Entry(path, status.st_size, str(status.st_mtime_ns))


def _walk(root: str, suffixes: re.Pattern[str], log: Callable[[str], None]) -> Iterator[_Entry]:
  def refuse(error: OSError) -> None:
    raise DataError(f"{printable(str(error.filename))} cannot be read: {error.strerror}; make it readable") from error

  links = []
  for folder, folders, names in os.walk(root, onerror=refuse):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    links += [os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
    for name in names:
      if not name.startswith(".") and suffixes.search(name):
        entry = _look(os.path.join(folder, name))
        if entry is not None:
          yield entry
  if links:
    log(f"data: {len(links)} links to folders below {printable(root)} are not followed, as {printable(links[0])}")


def _match(pattern: str) -> tuple[str, list[_Entry]]:
  """Returns the fixed part of an absolute glob, and the files it matches; hidden ones where it names a dot."""
  parts = pattern.split("/")
  depth = next(index for index, part in enumerate(parts) if glob.has_magic(part))
  base = "/".join(parts[:depth]) or "/"
  rest = "/".join(parts[depth:] + (["*"] if parts[-1] == "**" else []))
  try:
    found = [str(path) for path in Path(base).glob(rest)]  # does not follow links to folders below **
  except (OSError, ValueError) as error:
    raise DataError(f"{printable(pattern)} cannot be searched: {in_short(error)}") from error
  if "/." not in "/" + rest:
    found = [path for path in found if "/." not in path[len(base.rstrip("/")) :]]
  entries = (_look(path) for path in found)
  return base, [entry for entry in entries if entry is not None]


def _find_remote(url: str, suffixes: re.Pattern[str], log: Callable[[str], None]) -> tuple[str, list[_Entry]]:
  """Returns the URL that names are relative to, and what is found."""
  del log
  with remote_errors(url):
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    if glob.has_magic(path) and not system.exists(path):
      found = system.glob(path, detail=True)
      base = path[: re.search(r"[*?\[]", path).start()].rpartition("/")[0]
    elif system.isdir(path):
      found = system.find(path, detail=True)
      found = {name: info for name, info in found.items() if suffixes.search(name.rpartition("/")[2])}
      found = {name: info for name, info in found.items() if "/." not in name[len(path) :]}
      base = path.rstrip("/")
    else:
      found = {path: system.info(path)}
      base = path.rpartition("/")[0]
    entries = [
      _Entry(system.unstrip_protocol(name), _size(info), next((str(info[key]) for key in _STAMPS if key in info), ""))
      for name, info in found.items()
      if info.get("type") != "directory"
    ]
    return system.unstrip_protocol(base), entries


def _size(info: dict[str, Any]) -> int:
  return -1 if info.get("size") is None else info["size"]


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
  """Turns what goes wrong with a remote file into a DataError; the libraries behind fsspec raise what they like."""
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    raise DataError(f"{printable(url)} cannot be read: {in_short(error)}") from error
