"""JSON lines and TensorBoard events in the workdir of a run; what is written is on disk when a call returns."""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class LineFile:
  """A file of JSON objects, one a line, that survives kills: a torn line is dropped when the file is opened next.

  Floats read back to the same bits. JSON has no NaN or infinity: a value that is not finite is written as null. Each
  line reaches the operating system before `write` returns, so only a power cut loses it.
  """

  def __init__(self, path: Path, is_kept: Callable[[dict[str, Any]], bool] = lambda values: True):
    self._path = path
    self._open(is_kept)

  def write(self, values: dict[str, Any]) -> None:
    """Writes a line as a whole or not at all. Raises OSError."""
    append(self._file, values)

  def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the lines that are not kept; all other bytes stay as they are."""
    self._file.close()
    self._open(is_kept)

  def close(self) -> None:
    self._file.close()

  def _open(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    if self._path.exists():
      lines = self._path.read_bytes().splitlines(keepends=True)
      kept = [line for line in lines if (values := parse_line(line)) is not None and is_kept(values)]
      if len(kept) < len(lines):
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("wb") as file:
          file.writelines(kept)
          file.flush()
          os.fsync(file.fileno())
        os.replace(temporary, self._path)
    self._file = self._path.open("ab", buffering=0)


def append(file: Any, values: dict[str, Any]) -> None:
  """Writes a line to an unbuffered file as a whole or not at all. Raises OSError."""
  line = json.dumps(_finite(values), allow_nan=False).encode() + b"\n"
  size = os.fstat(file.fileno()).st_size
  try:
    if file.write(line) < len(line):  # a disk that becomes full takes a part
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
  except OSError:
    os.ftruncate(file.fileno(), size)
    raise


def parse_line(line: bytes) -> dict[str, Any] | None:
  """Returns the object of a whole line; None where the line is torn or damaged."""
  if not line.endswith(b"\n"):
    return None
  try:
    values = json.loads(line)
  except ValueError:
    return None
  return values if isinstance(values, dict) else None


def up_to(step: int) -> Callable[[dict[str, Any]], bool]:
  """Returns which lines are of `step` or earlier; of step 0 none is."""
  return lambda values: isinstance(values.get("step"), int) and 0 < values["step"] <= step


class EventFile:
  """One TensorBoard event file, flushed at every event.

  tensorboardX's own SummaryWriter pickles every scalar through a queue to a thread that flushes when it sees fit; its
  EventsWriter takes all scalars of a step in one event, in microseconds, and a killed run keeps them.
  """

  def __init__(self, directory: Path, resume_step: int):
    with _hidden("torch"):  # tensorboardX imports it where it is installed, for seconds and hundreds of megabytes
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2, summary_pb2

    directory.mkdir(exist_ok=True)
    self._event, self._summary, self._log = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
    # The name holds the start in seconds; the suffix keeps two sessions of the same second apart, and in order.
    self._writer = EventsWriter(str(directory / "events"), f".{resume_step:09d}")
    # By no public name: its own flush waits for the disk as well.
    self._flush = self._writer._py_recordio_writer._writer.flush
    self.rewind(resume_step)

  def rewind(self, step: int) -> None:
    """Has TensorBoard hide earlier events of the steps after `step`."""
    start = self._log(status=self._log.START)
    self._writer.write_event(self._event(wall_time=time.time(), step=step + 1 if step else 0, session_log=start))

  def write(self, step: int, scalars: dict[str, int | float]) -> None:
    values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
    self._flush()

  def close(self) -> None:
    self._writer.close()


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
  """Makes a package that is not imported yet seem not to be installed."""
  if name in sys.modules:
    yield
    return
  sys.modules[name] = None
  try:
    yield
  finally:
    del sys.modules[name]


def _finite(value: Any) -> Any:
  """Returns `value` with None in place of every float that is not finite."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
