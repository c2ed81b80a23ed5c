"""Directories that exist whole or not at all, whenever the process that writes them dies."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ultrathink_jax.errors import DataError

_MANIFEST = "manifest.json"
_STARTED = "started"  # in a directory that is being written: its key


def read_manifest(directory: Path, key: str | None = None) -> dict[str, Any] | None:
  """Returns the manifest of a directory that was finished, under the same key if one is given, else None."""
  try:
    manifest = json.loads((directory / _MANIFEST).read_text())
  except (OSError, ValueError):
    return None
  return manifest if isinstance(manifest, dict) and key in (None, manifest.get("key")) else None


def write_directory(
  directory: Path, key: str, write: Callable[[Path], dict[str, Any]], is_resumable: bool = False
) -> dict[str, Any]:
  """Lets `write` fill a temporary directory, adds the manifest it returns and renames the whole into place.

  What stood at `directory` is replaced. The caller holds the lock of its parent. Where `is_resumable`, `write` finds in
  the directory what an earlier call with the same key had written when it died.
  """
  temporary = directory.with_name(directory.name + ".incomplete")
  started = temporary / _STARTED
  if not (is_resumable and started.exists() and started.read_text() == key):
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    started.write_text(key)
  manifest = {"key": key, **write(temporary)}
  started.unlink()
  (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
  if directory.exists():
    outdated = directory.with_name(directory.name + ".outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    os.rename(directory, outdated)
    os.rename(temporary, directory)
    shutil.rmtree(outdated)
  else:
    os.rename(temporary, directory)
  return manifest


@contextlib.contextmanager
def lock(directory: Path, log: Callable[[str], None]) -> Iterator[None]:
  """Keeps other processes from preparing the same directory; the system frees the lock of a killed process."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / ".lock", "w")  # noqa: SIM115, closed below
  except OSError as error:
    raise DataError(f"data directory {directory} cannot be written: {error.strerror}; choose another one") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f"data: waiting for another process to prepare {directory}")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
