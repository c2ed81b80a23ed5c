"""Who may end a run while it trains: a signal, another process that stops, or a watchdog where nothing moves."""

import contextlib
import faulthandler
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ultrathink_jax.errors import PeerError
from ultrathink_jax.interruption import Answer, Interruption
from ultrathink_jax.parallel import processes
from ultrathink_jax.watchdog import Watchdog

_WAIT_SECONDS = 600.0  # for data, a save, an evaluation, or a first step, which may set up connections
_STEP_SECONDS = 30.0
_FACTOR = 10.0  # of what is usual, which is then a hang
_NUM_UNUSUAL = 2  # steps, the first ones: one waits for the program to load, the next for the first
_WAITS = ("data", "save")
_STEPS = ("train", "step")


class Supervisor:
  """A context manager around a training loop, which asks it before every step and says in which phase it is.

  A phase that takes too long ends all processes with exit code 6, after each has written the stacks of its threads to
  WORKDIR/hang-PROCESS.txt. Too long is `hang_seconds` for a step, or where that is 0, ten times what steps took so far,
  at least 30 s; data and saves have ten minutes, evaluations too after the first one, which compiles.
  """

  def __init__(self, workdir: Path, hang_seconds: int | float = 0, interruption: Interruption | None = None):
    """Without an entered `interruption`, signals do what they do elsewhere."""
    self._interruption = interruption or Interruption()
    self._hang_seconds = hang_seconds
    self._path = workdir / f"hang-{processes.process_index()}.txt"
    self._watchdog = Watchdog(self._end)
    self._stopping = processes.stopping()
    self._step_seconds: deque[float] = deque(maxlen=64)
    self._num_steps = 0
    self._evaluation_seconds = 0.0
    self._step: int | None = None
    self._phases = ["start"]

  def __enter__(self) -> "Supervisor":
    self._context = contextlib.ExitStack()
    self._context.enter_context(processes.on_loss(self._write_stacks))
    self._context.enter_context(self._watchdog)
    return self

  def __exit__(self, *exception: object) -> None:
    self._context.close()

  def requested(self) -> str | None:
    """Returns the name of the signal that stops the run, None where none has."""
    return self._interruption.requested() or (self._stopping.reason if self._stopping else None)

  def may_begin(self, step: int) -> bool:
    """Returns whether to make another step after `step` of them; if not, the loop is to save and leave.

    All processes are refused after the same step.
    """
    self._step = step + 1
    self._beat()
    if self._stopping is None:
      return self._interruption.requested() is None
    return self._stopping.may_begin()

  @contextlib.contextmanager
  def phase(self, name: str, answer: Answer) -> Iterator[None]:
    """Says what its body does, and how signals are answered there: see `Interruption`.

    "train" and "step" are timed as steps, "data", "save" and "evaluate" as such; others take as long as they do.
    """
    begun = time.monotonic()
    self._phases.append(name)
    self._beat()
    try:
      with self._interruption.phase(name, answer):
        yield
      self._learn(name, time.monotonic() - begun)
    finally:
      self._phases.pop()
      self._beat()

  def _learn(self, name: str, seconds: float) -> None:
    if name == "step":
      self._num_steps += 1
      if self._num_steps > _NUM_UNUSUAL:
        self._step_seconds.append(seconds)
    elif name == "evaluate":
      self._evaluation_seconds = max(self._evaluation_seconds, seconds)

  def _beat(self) -> None:
    self._watchdog.beat(self._phases[-1], self._limit(self._phases[-1]))

  def _limit(self, phase: str) -> int | float | None:
    if phase in _STEPS:
      if self._hang_seconds:
        return self._hang_seconds
      if not self._step_seconds:
        return _WAIT_SECONDS
      return max(_STEP_SECONDS, _FACTOR * statistics.median(self._step_seconds))
    if phase in _WAITS:
      return max(_WAIT_SECONDS, self._hang_seconds)
    if phase == "evaluate" and self._evaluation_seconds:
      return max(_WAIT_SECONDS, self._hang_seconds, _FACTOR * self._evaluation_seconds)
    return None

  def _end(self, phase: str, seconds: float) -> None:
    where = phase if self._step is None else f"{phase}, step {self._step}"
    line = f"process {processes.process_index()} made no progress for {seconds:.0f} s in {where}"
    resumes = f"stacks in {self._path}; the same command resumes from the last checkpoint"
    with processes.ending(PeerError.exit_code, f"{line}; {resumes}"):
      self._write_stacks(line)
      faulthandler.dump_traceback(sys.__stderr__)

  def _write_stacks(self, line: str) -> None:
    """Writes why this process ends, where it is and what its threads do."""
    with open(self._path, "w") as file:
      file.write(f"{line}\nphase {self._phases[-1]}, step {self._step}\n\n")
      file.flush()
      faulthandler.dump_traceback(file)
