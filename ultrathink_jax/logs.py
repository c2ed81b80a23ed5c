"""What the program says: on the console, and with times and levels in the rotating WORKDIR/train.log.

Nothing is said before `configure`, so that the package is silent as a library. Everything is redacted.
"""

import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.redaction import redact

FILE_NAME = "train.log"
LEVEL_VARIABLE = "ULTRATHINK_LOG_LEVEL"
LEVELS = {name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR")}

_MAX_BYTES = 10 * 2**20
_NUM_OLD_FILES = 5
_FILE_ONLY = {"file_only": True}  # marks a record that the console has already
_CHATTY = ("absl", "orbax")  # libraries that tell more at level DEBUG

_logger = logging.getLogger("ultrathink_jax")
_logger.addHandler(logging.NullHandler())
_added: list[tuple[logging.Logger, logging.Handler]] = []


def _print(text: str, is_wrong: bool) -> None:
  print(text, file=sys.stderr if is_wrong else sys.stdout, flush=True)


_printer: Callable[[str, bool], None] = _print


def configure(workdir: Path | None, is_first: bool) -> None:
  """Starts to print on the console and, with a workdir, to write its train.log; in the first process of a run only.

  ULTRATHINK_LOG_LEVEL, INFO by default, is what the console shows at least. The file has INFO and above, at DEBUG all,
  and warnings of other libraries. A second call takes the place of the first. Raises ConfigError.
  """
  level = level_of(os.environ.get(LEVEL_VARIABLE, "INFO"))
  close()
  if not is_first:
    return
  _logger.propagate = False  # other handlers of the root would print it again
  _logger.setLevel(min(level, logging.INFO))
  _add(_logger, _Console(level))
  if workdir is None:
    return
  root = logging.getLogger()
  if not root.handlers:  # Python prints warnings by itself only as long as there are none
    _add(root, _Console(max(level, logging.WARNING)))
  workdir.mkdir(parents=True, exist_ok=True)
  file = _File(workdir / FILE_NAME, maxBytes=_MAX_BYTES, backupCount=_NUM_OLD_FILES, encoding="utf-8", delay=True)
  file.setFormatter(_Line("%(asctime)s %(levelname)s %(message)s"))
  _add(_logger, file)
  _add(root, _Others(file, logging.INFO if level == logging.DEBUG else logging.WARNING))
  if level == logging.DEBUG:
    for name in _CHATTY:
      logging.getLogger(name).setLevel(logging.INFO)


def close() -> None:
  """Ends what `configure` began."""
  for logger, handler in reversed(_added):
    logger.removeHandler(handler)
    handler.close()
  _added.clear()
  for name in _CHATTY:
    logging.getLogger(name).setLevel(logging.NOTSET)
  _logger.propagate = True
  _logger.setLevel(logging.NOTSET)


def level_of(name: str) -> int:
  """Returns the level of a name. Raises ConfigError."""
  if name.strip().upper() not in LEVELS:
    raise ConfigError(f"{LEVEL_VARIABLE}={name!r} is not one of {', '.join(LEVELS)}; leave it out for INFO")
  return LEVELS[name.strip().upper()]


def log(text: str) -> None:
  """Says what a user wants to know, on standard output."""
  _logger.info("%s", text)


def debug(text: str) -> None:
  """Says what only someone who looks for a fault wants to know."""
  _logger.debug("%s", text)


def warn(text: str) -> None:
  """Says on standard error what is wrong without ending the program."""
  _logger.warning("%s", text)


def record_error(error: BaseException) -> None:
  """Writes an error that ends the program, with its traceback, to the file; it is printed elsewhere."""
  _logger.error("%s", f"{type(error).__name__}: {error}", exc_info=error, extra=_FILE_ONLY)


@contextlib.contextmanager
def printing_by(printer: Callable[[str, bool], None]) -> Iterator[None]:
  """Has lines printed by a function of (text, whether it says what is wrong): one that knows of a progress bar."""
  global _printer
  before, _printer = _printer, printer
  try:
    yield
  finally:
    _printer = before


def _add(logger: logging.Logger, handler: logging.Handler) -> None:
  logger.addHandler(handler)
  _added.append((logger, handler))


class _Line(logging.Formatter):
  """Lines without secrets, tracebacks neither."""

  def format(self, record: logging.LogRecord) -> str:
    return redact(super().format(record))


class _Console(logging.Handler):
  """Standard output, and standard error from warnings on."""

  def __init__(self, level: int):
    super().__init__(level)
    self.setFormatter(_Line("%(message)s"))

  def emit(self, record: logging.LogRecord) -> None:
    if getattr(record, "file_only", False):
      return
    with contextlib.suppress(OSError, ValueError):  # a console that is gone must not end a run
      _printer(self.format(record), record.levelno >= logging.WARNING)


class _File(logging.handlers.RotatingFileHandler):
  """A file that gives up, once and aloud, where it cannot be written."""

  def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
    self.setLevel(logging.CRITICAL + 1)
    _printer(f"[log] {self.baseFilename} cannot be written: {sys.exc_info()[1]}; it ends here", True)


class _Others(logging.Handler):
  """Hands what other libraries say to the file."""

  def __init__(self, file: _File, level: int):
    super().__init__(level)
    self._file = file

  def emit(self, record: logging.LogRecord) -> None:
    if record.levelno >= self._file.level:
      self._file.handle(record)
