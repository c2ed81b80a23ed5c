"""A workdir is of one run at a time."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ultrathink_jax.errors import ConfigError

LOCK = "lock"


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
  """Holds WORKDIR/lock, which says by whom, until its body is left or the process ends, however that happens.

  For the first process of a run alone. Raises ConfigError where another process holds it, or it cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}; choose another") from error
  with open(descriptor, "r+", encoding="utf-8", errors="replace") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(
        f"--workdir={workdir} is in use by {_holder(file.read())}; wait for it, stop it, or choose another --workdir"
      ) from error
    except OSError as error:
      raise ConfigError(
        f"--workdir={workdir} cannot be locked: {error.strerror}; choose one on a file system with locks (flock)"
      ) from error
    file.truncate(0)
    begun = time.strftime("%Y-%m-%d %H:%M:%S %z")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "begun": begun}, file)
    file.flush()
    yield


def _holder(text: str) -> str:
  try:
    values = json.loads(text)
    return f"process {values['pid']} on {values['host']} since {values['begun']}"
  except (ValueError, KeyError, TypeError):  # it has just begun
    return "another process"
