"""What Orbax and TensorStore say when they cannot read or write: one line, and nothing beside it."""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any


def describe(error: Exception) -> str:
  """Returns what an error of the file system, of Orbax or of TensorStore comes to, in one line."""
  if isinstance(error, OSError) and error.strerror:
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
  if found := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(found[1]))
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


# What is logged, with its traceback, about a save of Orbax that fails, Orbax raises too.
logging.getLogger("absl").setLevel(logging.WARNING)
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: ".orbax-checkpoint-tmp" not in record.getMessage())


def _report_unraisable(unraisable: Any, report: Callable[[Any], Any] = sys.unraisablehook) -> None:
  """Leaves out what TensorStore says when a write ends that Orbax, after another one failed, no longer waits for."""
  if str(unraisable.exc_value) != "Event loop is closed":
    report(unraisable)


sys.unraisablehook = _report_unraisable
