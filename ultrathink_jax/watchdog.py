"""Notices that a program makes no progress any more."""

import threading
from collections.abc import Callable

TICK_SECONDS = 0.5


class _Beat:
  """A sign of life: what the program has begun, and for how long it may be silent."""

  def __init__(self, what: str, limit_seconds: int | float | None):
    self.what, self.limit_seconds, self.silent_seconds = what, limit_seconds, 0.0


class Watchdog:
  """A context manager that calls `bark(what, seconds)`, in a thread, when nothing was heard for too long.

  It counts its own ticks instead of reading a clock: a process that was suspended has not been silent meanwhile.
  """

  def __init__(self, bark: Callable[[str, float], None]):
    self._bark = bark
    self._beat = _Beat("start", None)
    self._is_closed = threading.Event()
    self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

  def beat(self, what: str, limit_seconds: int | float | None) -> None:
    """Says that `what` begins, and that there is a next beat within `limit_seconds`; None: that may take any time."""
    self._beat = _Beat(what, limit_seconds)

  def __enter__(self) -> "Watchdog":
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._is_closed.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._is_closed.wait(TICK_SECONDS):
      beat = self._beat
      beat.silent_seconds += TICK_SECONDS
      if beat.limit_seconds is not None and beat.silent_seconds > beat.limit_seconds:
        self._bark(beat.what, beat.silent_seconds)
        return
