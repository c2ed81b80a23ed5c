"""Which part of the time since a run began went into steps that count, and where the rest went.

WORKDIR/sessions.jsonl has a line for each start of the program, for each step that steps begin from, and now and then
for how far they have come. What is known after a kill is what the last line says; the time from then to the next start
is lost, with the steps in it.
"""

import bisect
import contextlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.parallel.processes import is_first
from ultrathink_jax.train.console import format_duration
from ultrathink_jax.train.sinks.files import LineFile, append, parse_line

FILE_NAME = "sessions.jsonl"
CAUSES = ("compile", "data_wait", "evaluation", "checkpoint")  # what a session spends time on beside steps

_LEAST_SECONDS = 5.0  # between lines that need not be
_LEAST_SHARE = 1e-3  # the same, of the time since the run began: days need few more lines than hours


class Account(NamedTuple):
  """Where the seconds from the first start to the last line went.

  Attributes:
    elapsed: all of them.
    productive: making steps that count: that were not made again later.
    lost: the others by cause: CAUSES, `start` before the first step of a session, `lost_steps` that were made again,
      `restart` between sessions, and `other`.
  """

  elapsed: float
  productive: float
  lost: dict[str, float]

  @property
  def share(self) -> float:
    """Of all time, the productive part."""
    return self.productive / self.elapsed if self.elapsed > 0 else 0.0

  @property
  def share_beside_compiling(self) -> float:
    """Of the time in which no program was compiled, the productive part."""
    rest = self.elapsed - self.lost["compile"]
    return self.productive / rest if rest > 0 else 0.0


class Goodput:
  """Keeps the account of a run; made as soon as the workdir belongs to this program.

  Time from `begin` on is that of steps, but for what is `spent` on something else. Of several processes only the first
  writes.
  """

  def __init__(self, workdir: Path, clock: Callable[[], int | float] = time.time):
    self._clock = clock
    self._path = workdir / FILE_NAME
    self._ledger = _Ledger()
    if is_first():
      workdir.mkdir(parents=True, exist_ok=True)
      self._ledger = _read(self._path)
      LineFile(self._path).close()  # drops what a kill tore
    self._spent: dict[str, float] = defaultdict(float)
    self._last_write = -math.inf
    self._say("start", None, is_written=True)

  def begin(self, step: int) -> None:
    """Says that steps are made from now on, the first of them after `step`: once in a session, and after going back."""
    self._say("begin", step, is_written=True)

  def mark(self, step: int, is_saved: bool = False) -> None:
    """Says that `step` is done: at logged steps, where it is saved, and at the end of a session."""
    self._say("mark", step, is_saved)

  @contextlib.contextmanager
  def spent(self, cause: str) -> Iterator[None]:
    """Books the time of its body on one of CAUSES; bodies do not nest."""
    begun = self._clock()
    try:
      yield
    finally:
      self.add(cause, self._clock() - begun)

  def add(self, cause: str, seconds: int | float) -> None:
    """Books seconds that have just passed on one of CAUSES."""
    if cause not in CAUSES:
      raise ValueError(f"{cause=} is not one of {', '.join(CAUSES)}")
    self._spent[cause] += seconds

  def account(self) -> Account:
    """Returns the account of all sessions, up to the last call here."""
    return self._ledger.account()

  def _say(self, event: str, step: int | None, is_written: bool) -> None:
    now = self._clock()
    line = {"event": event, "time": now, "step": step, "spent": dict(self._spent)}
    self._ledger.add(line)
    least = max(_LEAST_SECONDS, _LEAST_SHARE * self._ledger.elapsed)
    if is_first() and (is_written or now - self._last_write >= least):
      with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
        append(file, line)  # a full disk costs a line, not the run
      self._last_write = now


def read_account(workdir: Path) -> Account | None:
  """Returns the account of the run in a workdir; None where nothing is written down."""
  ledger = _read(workdir / FILE_NAME)
  return ledger.account() if ledger.elapsed else None


def format_account(account: Account) -> str:
  """Returns one line: goodput 96.1% of 2h05m; lost: restart 2m10s, compile 1m02s."""
  lost = sorted(account.lost.items(), key=lambda item: -item[1])
  parts = [f"{cause.replace('_', ' ')} {format_duration(seconds)}" for cause, seconds in lost if seconds >= 0.5]
  line = f"goodput {account.share:.1%} of {format_duration(account.elapsed)}"
  return line + (f"; lost: {', '.join(parts)}" if parts else "")


def _read(path: Path) -> "_Ledger":
  ledger = _Ledger()
  if path.exists():
    for line in path.read_bytes().splitlines(keepends=True):
      values = parse_line(line)
      if values is not None and values.keys() >= {"event", "time", "step", "spent"}:
        ledger.add(values)
  return ledger


class _Stretch:
  """Steps in a row, until the session ends or goes back: how long the steps up to each known one took."""

  def __init__(self, step: int):
    self._steps, self._seconds = [step], [0.0]
    self.unfinished = 0.0  # seconds after the last known step

  @property
  def first(self) -> int:
    return self._steps[0]

  @property
  def total(self) -> float:
    return self._seconds[-1] + self.unfinished

  def work(self, seconds: int | float, step: int) -> None:
    """Counts seconds after which `step` is the last one done."""
    self.unfinished += seconds
    if step > self._steps[-1]:
      self._steps.append(step)
      self._seconds.append(self.total)
      self.unfinished = 0.0

  def seconds_up_to(self, step: int | float) -> int | float:
    """Returns the time of the steps up to `step`, evenly spread between known ones."""
    place = bisect.bisect_right(self._steps, step)
    if place == len(self._steps):
      return self._seconds[-1]
    if place == 0:
      return 0.0
    (first, last), (before, after) = self._steps[place - 1 : place + 1], self._seconds[place - 1 : place + 1]
    return before + (after - before) * (step - first) / (last - first)


class _Ledger:
  """Adds up lines."""

  def __init__(self) -> None:
    self._begun: float | None = None
    self._now = 0.0
    self._seconds: dict[str, float] = defaultdict(float)  # by cause
    self._booked: dict[str, float] = {}  # of this session, up to the last line
    self._stretches: list[_Stretch] = []
    self._is_stepping = False

  @property
  def elapsed(self) -> float:
    return 0.0 if self._begun is None else self._now - self._begun

  def add(self, line: dict[str, Any]) -> None:
    event, now, step, spent = line["event"], line["time"], line["step"], line["spent"]
    if self._begun is None:
      self._begun = self._now = now
    interval, self._now = max(0.0, now - self._now), max(now, self._now)
    if event == "start":
      self._seconds["restart"] += interval
      self._booked, self._is_stepping = {}, False
      return
    for cause, seconds in spent.items():
      new = seconds - self._booked.get(cause, 0.0)
      self._seconds[cause] += new
      interval -= new
    self._booked = spent
    interval = max(0.0, interval)
    if self._is_stepping:
      self._stretches[-1].work(interval, step)
    else:
      self._seconds["start"] += interval
    if event == "begin":
      self._stretches.append(_Stretch(step))
      self._is_stepping = True

  def account(self) -> Account:
    """Returns where the time went; a stretch counts up to the least step that a later one began from."""
    begins = [stretch.first for stretch in self._stretches[1:]]
    limits = [*reversed(list(itertools.accumulate(reversed(begins), min))), math.inf][: len(self._stretches)]
    counted = [stretch.seconds_up_to(limit) for stretch, limit in zip(self._stretches, limits, strict=True)]
    productive = sum(counted)
    lost = {cause: self._seconds[cause] for cause in (*CAUSES, "start", "restart")}
    totals = [stretch.total for stretch in self._stretches[:-1]]
    lost["lost_steps"] = sum(totals) - sum(counted[:-1])
    lost["other"] = max(0.0, self.elapsed - productive - sum(lost.values()))
    return Account(self.elapsed, productive, lost)
