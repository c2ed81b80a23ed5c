"""A trace of some steps, and which operations took their time."""

import contextlib
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.processes import is_first

_NUM_SHOWN = 20


class Operation(NamedTuple):
  """What all runs of an operation took by themselves, without what runs inside them."""

  name: str
  count: int
  seconds: float
  share: float  # of the time of all operations


def parse_steps(spec: str) -> tuple[int, int]:
  """Returns the first and the last step, counted from 1, of FIRST:LAST. Raises ConfigError."""
  match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", spec)
  if match is None or not 1 <= int(match[1]) <= int(match[2]):
    raise ConfigError(
      f"--profile_steps={spec} is not FIRST:LAST with 1 <= FIRST <= LAST; 10:15 traces steps 10 to 15, both included"
    )
  return int(match[1]), int(match[2])


class Profiler:
  """Traces the steps of `spec`, as 10:15, into WORKDIR/profile and then prints what took longest; None traces nothing.

  The first traced step begins when the device has done what came before it, and the trace ends when the last is done.
  Of several processes only the first traces.
  """

  def __init__(self, spec: str | None, workdir: Path, log: Callable[[str], None]):
    steps = None if spec is None else parse_steps(spec)
    self._steps = steps if is_first() else None
    self._directory = workdir / "profile"
    self._log = log
    self._is_tracing = False

  @contextlib.contextmanager
  def step(self, done: int) -> Iterator[None]:
    """Surrounds the step after the first `done` ones."""
    if self._steps is None:
      yield
      return
    first, last = self._steps
    if first <= done + 1 <= last and not self._is_tracing:
      self._start()
    with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
      yield
    if done + 1 >= last:
      self.close()

  def close(self) -> None:
    """Ends a trace that is running, as when training ends before its last step."""
    if not self._is_tracing:
      return
    self._is_tracing = False
    _wait_for_devices()
    jax.profiler.stop_trace()
    path = max(self._directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    self._log(f"[profile] trace in {path.parent}; open it with xprof or TensorBoard's profile plugin")
    for line in format_operations(read_operations(path)):
      self._log(line)

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call is an event, in a file of gigabytes
    _wait_for_devices()
    jax.profiler.start_trace(str(self._directory), profiler_options=options)
    self._is_tracing = True


def _wait_for_devices() -> None:
  """Returns when the devices of this process have done what they were given before: each works in order."""
  for device in jax.local_devices():
    jax.block_until_ready(jax.device_put(0, device) + 1)


def read_operations(path: Path) -> list[Operation]:
  """Returns the operations that devices ran during a trace, those that took longest first."""
  seconds: dict[str, float] = defaultdict(float)
  counts: dict[str, int] = defaultdict(int)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the reader's own types, in Python 3.12
    for events in _lines(path):
      for name, own in _own_times(events):
        seconds[name] += own * 1e-9
        counts[name] += 1
  total = sum(seconds.values())
  ranked = sorted(seconds, key=lambda name: -seconds[name])
  return [Operation(name, counts[name], seconds[name], seconds[name] / total) for name in ranked]


def format_operations(operations: list[Operation]) -> list[str]:
  """Returns a line for each of the longest operations."""
  if not operations:
    return ["[profile] no operation of a device is in the trace"]
  shown = operations[:_NUM_SHOWN]
  width = max(len(operation.name) for operation in shown)
  lines = [f"[profile] {'operation':{width}} {'runs':>7} {'total ms':>10} {'share':>6}"]
  for name, count, seconds, share in shown:
    lines.append(f"[profile] {name:{width}} {count:7,} {seconds * 1e3:10.2f} {share:6.1%}")
  rest = operations[_NUM_SHOWN:]
  if rest:
    time, share = sum(each.seconds for each in rest), sum(each.share for each in rest)
    lines.append(f"[profile] {f'{len(rest)} others':{width}} {'':7} {time * 1e3:10.2f} {share:6.1%}")
  return lines


def _lines(path: Path) -> Iterator[list[tuple[str, float, float]]]:
  """Yields (name, start, duration) in nanoseconds of the operations on each line of a trace.

  Those of a TPU stand on a line of their own, those of a GPU on its streams, those of a CPU among others on threads.
  """
  planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
  for plane in devices or planes:
    lines = list(plane.lines)
    own = [line for line in lines if line.name == "XLA Ops"]
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in own or streams or lines:
      events = line.events if own or streams else _operations_among(line.events)
      yield [(event.name, event.start_ns, event.duration_ns) for event in events]


def _operations_among(events: Iterable[jax.profiler.ProfileEvent]) -> list[jax.profiler.ProfileEvent]:
  return [event for event in events if any(name == "hlo_op" for name, _ in event.stats)]


def _own_times(events: list[tuple[str, float, float]]) -> Iterator[tuple[str, float]]:
  """Yields (name, duration without the events inside) for nested events of one thread."""
  stack: list[list] = []  # name, end, own duration
  for name, start, duration in sorted(events, key=lambda event: (event[1], -event[2])):
    while stack and stack[-1][1] <= start:
      top = stack.pop()
      yield top[0], top[2]
    if stack:
      stack[-1][2] -= min(duration, stack[-1][1] - start)
    stack.append([name, start + duration, duration])
  for name, _, own in stack:
    yield name, own
