"""Answers the signals that ask a run to stop: at once where there is nothing to save, else when it has saved.

Uses the standard library alone, so that it is there before imports that take seconds.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, NoReturn

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER = "ULTRATHINK_LAUNCHER"  # the variable by which a launcher says which process it is
RESUMES = "the same command resumes from the last checkpoint"
_SAME_SECONDS = 0.1  # within which signals are one: some senders send to a process and then to its group
_FLUSH_SECONDS = 1.0  # after which a process ends even where nobody reads what it says
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux

Answer = Literal["leave", "raise", "finish"]


class Stopped(BaseException):
  """A signal asks the program to stop; raised in the main thread, in a phase whose answer is "raise"."""

  exit_code = EXIT_CODE


class _Phase(NamedTuple):
  name: str
  answer: Answer

  @property
  def where(self) -> str:
    return f" in phase {self.name}" if self.name else ""


class Interruption:
  """A context manager that answers SIGTERM, SIGINT and SIGUSR1; entered in the main thread.

  What the first of them does depends on the phase the program is in:

    leave: the process ends at once with code 75, even inside a long call into C. So begins every program.
    raise: `Stopped` is raised in the main thread, as soon as that runs Python code.
    finish: nothing but that `requested` tells; the program ends by itself where it can be resumed exactly.

  Whatever the main thread does, the process ends `stop_seconds` after the first signal, with code 75. A second signal
  ends it at once, with 128 + its number. Signals that whoever started the program ignores stay ignored. A call into C
  that keeps the interpreter's lock is all that can delay an answer.

  Attributes:
    stop_seconds: from the first signal to the end at the latest.
    is_alone: False where other processes wait for this one, which then treats "raise" as "finish".
    on_request: called with the name of the first signal, in another thread.
    tell: called with the exit code and a line before the process ends by itself.
  """

  def __init__(self, stop_seconds: int | float = 12.0, on_exit: Callable[[str], None] | None = None):
    """`on_exit` prints the line that says why the process ends; by default to stderr."""
    self.stop_seconds = stop_seconds
    self.is_alone = True
    self.on_request: Callable[[str], None] = lambda name: None
    self.tell: Callable[[int, str], None] = lambda code, line: None
    self._on_exit = on_exit or _print
    self._phase = _Phase("", "leave")
    self._requested: str | None = None
    self._first_at: float | None = None
    self._has_raised = False
    self._leaving = threading.Lock()
    self._deadline: threading.Timer | None = None
    self._handlers: dict[signal.Signals, Any] = {}

  def requested(self) -> str | None:
    """Returns the name of the first signal, None before it came."""
    return self._requested

  @contextlib.contextmanager
  def phase(self, name: str, answer: Answer) -> Iterator[None]:
    """Answers signals by `answer` within its body; the phase around it comes back after it.

    A signal that came before is answered as it begins, and as the phase around it comes back. A body that is left by an
    exception is left undisturbed.
    """
    outer = self._phase
    try:
      self._take(_Phase(name, answer))
      yield
    finally:
      self._phase = outer
    self._take(outer)

  def __enter__(self) -> "Interruption":
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    # Python runs handlers between bytecodes of the main thread only; the number of a signal is written here at once.
    self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
    for number in SIGNALS:
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._handlers[number] = signal.signal(number, self._handle)
    self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
    self._thread.start()
    _end_with_launcher()
    return self

  def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
    if isinstance(error, Stopped):
      self._leave(EXIT_CODE, str(error))
    if error is not None and self._requested is not None:  # what is left to do is to end, which has its limit too
      return
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_fd)
    self._writer.close()
    self._thread.join()
    self._reader.close()
    if self._deadline is not None:
      self._deadline.cancel()

  def _take(self, phase: _Phase) -> None:
    self._phase = phase
    if self._requested is not None:
      if phase.answer == "leave":
        self._leave(EXIT_CODE, self._why(phase))
      self._raise_once(phase)

  def _handle(self, number: int, frame: object) -> None:
    """Answers a signal in the main thread; what can be done without it is done by `_answer`."""
    if self._requested is None:
      self._requested = signal.Signals(number).name
    self._raise_once(self._phase)

  def _raise_once(self, phase: _Phase) -> None:
    if phase.answer == "raise" and self.is_alone and not self._has_raised:
      self._has_raised = True
      raise Stopped(self._why(phase))

  def _why(self, phase: _Phase) -> str:
    return f"{self._requested}{phase.where}; {RESUMES}"

  def _watch(self) -> None:
    while numbers := self._reader.recv(64):
      for number in numbers:
        if number in self._handlers:
          self._answer(signal.Signals(number))

  def _answer(self, number: signal.Signals) -> None:
    now = time.monotonic()
    if self._first_at is not None:
      if now - self._first_at > _SAME_SECONDS:
        self._leave(128 + number, f"{number.name} after {self._requested}, before all was saved; {RESUMES}")
      return
    self._first_at = now
    self._requested = self._requested or number.name
    late = f"{self._requested}, and nothing was saved within {self.stop_seconds:g} s{{}}; {RESUMES}"
    self._deadline = threading.Timer(self.stop_seconds, lambda: self._leave(EXIT_CODE, late.format(self._phase.where)))
    self._deadline.daemon = True
    self._deadline.start()
    phase = self._phase
    if phase.answer == "leave":
      self._leave(EXIT_CODE, self._why(phase))
    self.on_request(self._requested)
    _print(f"[stop] {self._requested}{phase.where}: the run stops as soon as it can be resumed exactly")

  def _leave(self, code: int, line: str) -> NoReturn:
    """Ends the process without the steps at exit, which could wait for threads that hang."""
    if not self._leaving.acquire(blocking=False):
      while True:  # another thread is about to end the process
        time.sleep(1)
    end = threading.Timer(_FLUSH_SECONDS, os._exit, (code,))
    end.daemon = True
    end.start()
    try:
      self.tell(code, line)
      self._on_exit(f"stopped: {line}")
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(code)


def _print(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # nobody listens any more
    print(f"{line}\n", end="", file=sys.stderr, flush=True)  # in one write, as other threads may print too


def _end_with_launcher() -> None:
  """Has the system send SIGTERM to this process when the launcher that started it dies."""
  launcher = int(os.environ.get(LAUNCHER, 0))
  if not launcher or not sys.platform.startswith("linux"):
    return
  if os.getppid() == launcher:
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
  try:
    os.kill(launcher, 0)
  except ProcessLookupError:  # it died before
    os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent() -> None:
  """Has this process, a worker that was spawned, end when its parent is gone; Ctrl-C is then for the parent to answer.

  Workers of an executor wait for work through a pipe that they hold open themselves, and would wait forever.
  """
  from multiprocessing import connection, process

  parent = process.parent_process()
  for number in (signal.SIGINT, signal.SIGUSR1):  # SIGTERM is how an executor ends its workers
    signal.signal(number, signal.SIG_IGN)

  def wait() -> None:
    connection.wait([parent.sentinel])
    os._exit(EXIT_CODE)

  threading.Thread(target=wait, name="parent", daemon=True).start()
