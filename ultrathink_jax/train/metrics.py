"""What a run reports while it trains: `metrics.jsonl`, `evaluations.jsonl`, TensorBoard, services and the console."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ultrathink_jax import logs
from ultrathink_jax.config import Config
from ultrathink_jax.parallel.processes import is_first
from ultrathink_jax.train.console import format_duration, format_evaluation, format_step
from ultrathink_jax.train.sinks.files import EventFile, LineFile, up_to
from ultrathink_jax.train.sinks.services import Background, open_services

STEPS_FILE, EVALUATIONS_FILE = "metrics.jsonl", "evaluations.jsonl"


class MetricsWriter:
  """A context manager that records the steps and evaluations of one session of a run.

  Opening it drops what an earlier session recorded after `resume_step`: those steps are about to be made again. With
  `resume_step=0` it drops everything. Services go on with their run; what they hold stays, and comes again.

  Values are Python, NumPy or JAX scalars; a nested value (moe/load) goes to the JSON files only.
  """

  def __init__(self, workdir: Path, resume_step: int, total_steps: int, config: Config | None = None):
    workdir.mkdir(parents=True, exist_ok=True)
    self._total_steps = total_steps
    self._first: tuple[int, float] | None = None  # the first step written, which has waited for compilation
    self._files = {name: LineFile(workdir / name, up_to(resume_step)) for name in (STEPS_FILE, EVALUATIONS_FILE)}
    self._events = EventFile(workdir / "tensorboard", resume_step)
    self._services: list[Background] = [] if config is None else open_services(workdir, config)
    self._failing: set[str] = set()  # files whose last write failed
    self._bar = None
    self._printing = contextlib.ExitStack()
    if sys.stderr.isatty():
      self._bar = tqdm(
        total=total_steps,
        initial=resume_step,
        miniters=1,
        dynamic_ncols=True,
        leave=False,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
      )
      self._printing.enter_context(logs.printing_by(_print_above))

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Records optimizer step `step`, counted from 1. `values` hold at least the keys that `format_step` reads."""
    values = _to_python(values)
    self._record(STEPS_FILE, step, values)
    line = format_step(step, self._total_steps, values)
    eta = self._eta(step)
    if self._bar is None:
      self.log(f"{line} eta={eta}" if eta else line)
      return
    self.log(line)
    self._bar.set_postfix_str(f"eta {eta}" if eta else "", refresh=False)
    self._bar.update(step - self._bar.n)

  def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
    """Records an evaluation made after `step` steps, with keys such as `evaluate/loss`."""
    values = _to_python(values)
    self._record(EVALUATIONS_FILE, step, values)
    self.log(format_evaluation(step, values))

  def rewind(self, step: int) -> None:
    """Drops what was recorded after `step`, from which the run goes on once more."""
    for file in self._files.values():
      file.keep(up_to(step))
    self._try("tensorboard", lambda: self._events.rewind(step))
    self._first = None
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def log(self, text: str) -> None:
    """Prints a line to standard output, above the progress bar where there is one."""
    logs.log(text)

  def close(self, has_failed: bool = False) -> None:
    """Ends the record; services are given less time to send what they hold where the run has failed."""
    self._printing.close()
    if self._bar is not None:
      self._bar.close()
    for file in self._files.values():
      file.close()
    with contextlib.suppress(OSError):  # a full disk
      self._events.close()
    for service in self._services:
      service.close(has_failed)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    self.close(has_failed=kind is not None)

  def _record(self, name: str, step: int, values: dict[str, Any]) -> None:
    scalars = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    self._try(name, lambda: self._files[name].write({"step": step, **values}))
    self._try("tensorboard", lambda: self._events.write(step, scalars))
    for service in self._services:
      service.write(step, scalars)

  def _try(self, name: str, write: Callable[[], None]) -> None:
    """Writes to a file; one that cannot be written, as on a full disk, misses steps and does not end the run."""
    try:
      write()
    except OSError as error:
      if name not in self._failing:
        logs.warn(f"[log] {name} misses steps from here on: {error.strerror or error}")
      self._failing.add(name)
    else:
      self._failing.discard(name)

  def _eta(self, step: int) -> str:
    """Returns the time left at the mean pace since the first step written here; empty before a second one."""
    now = time.monotonic()
    if self._first is None:
      self._first = (step, now)
    first_step, first_time = self._first
    if step <= first_step:
      return ""
    return format_duration((self._total_steps - step) * (now - first_time) / (step - first_step))


class _Silence(MetricsWriter):
  """Writes nothing: what stands for a writer where another process reports."""

  def __init__(self) -> None:
    pass

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    pass

  def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
    pass

  def rewind(self, step: int) -> None:
    pass

  def log(self, text: str) -> None:
    pass

  def close(self, has_failed: bool = False) -> None:
    pass


def open_writer(workdir: Path, resume_step: int, total_steps: int, config: Config | None = None) -> MetricsWriter:
  """Returns the writer of a run, to the sinks of its configuration; in all processes but the first, a silent one."""
  return MetricsWriter(workdir, resume_step, total_steps, config) if is_first() else _Silence()


def _print_above(text: str, is_wrong: bool) -> None:
  """Prints a line above the progress bar."""
  stream = sys.stderr if is_wrong else sys.stdout
  tqdm.write(text, file=stream)
  stream.flush()


def _to_python(value: Any) -> Any:
  """Returns `value` with NumPy and JAX scalars and arrays as Python numbers and lists."""
  if isinstance(value, Mapping):
    return {key: _to_python(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_python(item) for item in value]
  return value.tolist() if hasattr(value, "tolist") else value
