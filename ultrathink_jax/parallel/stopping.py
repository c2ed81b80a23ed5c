"""How the processes of a run stop after the same step when a signal reaches one of them, or several.

Nobody may leave while others wait for it in a collective operation. The process that is signalled tells the first one,
which asks all how many turns (steps, for a training loop) they have begun. Each answers, and begins none until it hears
the verdict: the largest of the answers. Up to that turn all go on, and then stop.
"""

import threading
from collections.abc import Callable
from typing import Any


class Stopping:
  """One process's part in the agreement. `tell` sends to the first process, and from it to all the others."""

  def __init__(self, index: int, num_processes: int, tell: Callable[[dict[str, Any]], None]):
    self.reason: str | None = None  # the name of the signal, once it is known here
    self._index, self._num_processes, self._tell = index, num_processes, tell
    self._changed = threading.Condition()
    self._num_begun = 0
    self._is_asked = False
    self._verdict: int | None = None
    self._answers: dict[int, int] = {}

  def may_begin(self) -> bool:
    """Returns whether this process may begin its next turn; where all are to stop, each is refused the same one.

    All processes take the same turns. Unless they are being asked, this takes a microsecond and sends nothing.
    """
    with self._changed:
      self._changed.wait_for(lambda: not self._is_asked or self._verdict is not None)
      if self._verdict is not None and self._num_begun >= self._verdict:
        return False
      self._num_begun += 1
      return True

  def request(self, reason: str) -> None:
    """Asks all processes to stop; from any thread, and from any number of processes."""
    if self._index:
      self._tell({"kind": "stop", "reason": reason})
    else:
      self._ask(reason)

  def hear(self, index: int, message: dict[str, Any]) -> None:
    """Takes a message of process `index`."""
    if message["kind"] == "stop":
      self._ask(message["reason"])
    elif message["kind"] == "ask":
      self._tell({"kind": "begun", "turns": self._hold(message["reason"])})
    elif message["kind"] == "begun":
      self._count(index, message["turns"])
    elif message["kind"] == "verdict":
      self._decide(message["turns"])

  def _ask(self, reason: str) -> None:
    with self._changed:
      if self._is_asked:
        return
      num_begun = self._hold(reason)
    self._tell({"kind": "ask", "reason": reason})
    self._count(0, num_begun)

  def _hold(self, reason: str) -> int:
    """Begins no further turn until the verdict, and returns how many have begun."""
    with self._changed:
      self._is_asked, self.reason = True, reason
      return self._num_begun

  def _count(self, index: int, turns: int) -> None:
    with self._changed:
      self._answers[index] = turns
      if len(self._answers) < self._num_processes:
        return
    verdict = max(self._answers.values())
    self._tell({"kind": "verdict", "turns": verdict})
    self._decide(verdict)

  def _decide(self, turns: int) -> None:
    with self._changed:
      self._verdict = turns
      self._changed.notify_all()
