"""Faults on order: a run is killed, hangs, meets NaNs or a full disk at steps that the environment names.

    ULTRATHINK_FAULTS="kill@120,nan@50-60,spike:0.01,slow_disk@100:5" python -m ultrathink_jax.main ...

Each fault is KIND@STEP, KIND@FIRST-LAST or KIND:PROBABILITY, then :SECONDS where the kind takes them, then /PROCESS in
a run of several, by default the first. Steps are counted from 1, as they are logged. What happens by chance happens at
the same steps again where the seed is the same.

    nan, spike         the loss is multiplied by NaN, or a million
    nan_data           the weights of the batch are NaN, whichever step reads it: batch 1 is the first one
    slow_data          the batch comes SECONDS later, by default 5, in every process
    kill               SIGKILL before the step, as for want of memory
    sigterm, sigint, sigusr1   the signal before the step
    hang               before the step nothing happens any more
    flip               before the step, a bit of the newest checkpoint is flipped
    disk_full          the save after the step fails
    slow_disk          the save after the step takes SECONDS longer, by default 5

Faults of a process, from kill to flip, happen once in a workdir: WORKDIR/faults.txt says which have.
"""

import contextlib
import errno
import os
import re
import signal
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.processes import is_first, process_index
from ultrathink_jax.testing.damage import flip_bit
from ultrathink_jax.types import Batch, LossInfo, Recipe, TrainState

VARIABLE = "ULTRATHINK_FAULTS"
FACTORS = {"nan": float("nan"), "spike": 1e6}
SIGNALS = {
  "kill": signal.SIGKILL,
  "sigterm": signal.SIGTERM,
  "sigint": signal.SIGINT,
  "sigusr1": signal.SIGUSR1,
}
_BEFORE_STEP = ("flip", "hang", *SIGNALS)
_DATA = ("nan_data", "slow_data")
_SLOW = ("slow_data", "slow_disk")
KINDS = (*FACTORS, *_DATA, *_BEFORE_STEP, "disk_full", "slow_disk")
_SYNTAX = re.compile(r"(\w+)(?:@(\d+)(?:-(\d+))?|:(\d*\.?\d+))(?::(\d*\.?\d+))?(?:/(\d+))?")


class Fault(NamedTuple):
  """Something that goes wrong at some steps: those from `first` to `last`, or any of them with a probability."""

  kind: str
  first: int
  last: int
  probability: float = 1.0
  seconds: float = 5.0
  process: int = 0

  def happens(self, step: Any, seed: int) -> Any:
    """Returns whether it happens at a step, or each of some; NumPy and JAX arrays alike, with the same answer."""
    is_between = (step >= self.first) & (step <= self.last)
    if self.probability == 1:
      return is_between
    xp = np if isinstance(step, np.ndarray) else jnp
    x = step.astype(xp.uint32) + xp.asarray(zlib.crc32(f"{seed}/{self.kind}".encode()), xp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # an integer hash; source: nullprogram.com, lowbias32
      x = (x ^ (x >> shift)) * xp.asarray(factor, xp.uint32)
    x ^= x >> 16
    return is_between & (x < xp.asarray(self.probability * 2**32, xp.uint32))


def from_environment(seed: int, workdir: Path, environment: Mapping[str, str] = os.environ) -> "Faults":
  """Returns the faults that ULTRATHINK_FAULTS names, and says so; none where it is not set. Raises ConfigError."""
  text = environment.get(VARIABLE, "")
  faults = Faults([_parse(part.strip()) for part in text.split(",") if part.strip()], seed, workdir)
  if text.strip() and is_first():
    print(f"[faults] {VARIABLE}={text}: this run is made to fail, with seed {seed}", flush=True)
  return faults


def _parse(text: str) -> Fault:
  found = _SYNTAX.fullmatch(text)
  if found is None:
    raise ConfigError(f"{VARIABLE} has {text!r}; write KIND@STEP, KIND@FIRST-LAST or KIND:PROBABILITY")
  kind, first, last, probability, seconds, process = found.groups()
  if kind not in KINDS:
    raise ConfigError(f"{VARIABLE} has {text!r}; kinds of faults are {', '.join(KINDS)}")
  if probability is not None and not 0 < float(probability) < 1:
    raise ConfigError(f"{VARIABLE} has {text!r}; a probability is between 0 and 1")
  if first is not None and not 1 <= int(first) <= int(last or first):
    raise ConfigError(f"{VARIABLE} has {text!r}; steps are counted from 1, and the first is not behind the last")
  if seconds is not None and kind not in _SLOW:
    raise ConfigError(f"{VARIABLE} has {text!r}; only {' and '.join(_SLOW)} take seconds")
  steps = (1, 2**31 - 1) if first is None else (int(first), int(last or first))
  return Fault(kind, *steps, float(probability or 1), float(seconds or 5), int(process or 0))


class Faults:
  """What goes wrong in one run."""

  def __init__(self, faults: Sequence[Fault], seed: int, workdir: Path):
    self._faults, self._seed, self._workdir = tuple(faults), seed, workdir

  def steps(self, kind: str, last: int) -> list[int]:
    """Returns the steps up to `last` at which a kind of fault happens."""
    steps = np.arange(1, last + 1)
    happens = [fault.happens(steps, self._seed) for fault in self.of(kind)]
    return steps[np.any(happens, axis=0)].tolist() if happens else []

  def wrap(self, recipe: Recipe) -> Recipe:
    """Returns the recipe with the faults of its losses and batches; the same one where there are none."""
    if self.of(*FACTORS):
      recipe = recipe._replace(loss=self._failing(recipe.loss))
    if self.of(*_DATA):
      make_source = recipe.source
      recipe = recipe._replace(source=lambda data, rows: _Source(make_source(data, rows), self))
    return recipe

  def before_step(self, done: int) -> None:
    """Lets happen what is due before the step after `done` steps."""
    for fault in self.of(*_BEFORE_STEP):
      if self.is_due(fault, done + 1) and fault.process == process_index() and self._is_new(fault, done + 1):
        if fault.kind == "hang":
          while True:
            time.sleep(1)
        elif fault.kind == "flip":
          self._flip(done + 1)
        else:
          os.kill(os.getpid(), SIGNALS[fault.kind])

  @contextlib.contextmanager
  def saving(self, done: int) -> Iterator[None]:
    """Runs its body, which saves the state after `done` steps, on the disk that was ordered."""
    due = [fault for fault in self.of("disk_full", "slow_disk") if self.is_due(fault, done)]
    time.sleep(sum(fault.seconds for fault in due if fault.kind == "slow_disk"))
    with contextlib.ExitStack() as stack:
      if any(fault.kind == "disk_full" for fault in due):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._workdir))
        stack.enter_context(mock.patch.object(ocp.AsyncCheckpointer, "save", side_effect=full))
      yield

  def of(self, *kinds: str) -> list[Fault]:
    """Returns the faults of some kinds."""
    return [fault for fault in self._faults if fault.kind in kinds]

  def is_due(self, fault: Fault, step: int) -> bool:
    """Returns whether a fault happens at a step."""
    return bool(fault.happens(np.array([step]), self._seed)[0])

  def _failing(self, loss: Any) -> Any:
    def failing_loss(params: Any, frozen: Any, batch: Batch, step: Any, key: Any) -> tuple[Any, LossInfo]:
      total, info = loss(params, frozen, batch, step, key)
      factor = jnp.ones((), total.dtype)
      for fault in self.of(*FACTORS):
        factor *= jnp.where(fault.happens(step + 1, self._seed), FACTORS[fault.kind], 1.0)
      metrics = {name: value * factor if name.startswith("loss/") else value for name, value in info.metrics.items()}
      return total * factor, info._replace(metrics=metrics)

    return failing_loss

  def _is_new(self, fault: Fault, step: int) -> bool:
    """Returns whether a fault has not happened yet at a step, and notes that it does now."""
    name = f"{fault.kind}@{step}/{fault.process}"
    path = self._workdir / "faults.txt"
    if path.exists() and name in path.read_text().splitlines():
      return False
    with open(path, "a") as file:
      file.write(f"{name}\n")
    return True

  def _flip(self, step: int) -> None:
    checkpoints = sorted((self._workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    if checkpoints:
      file, byte, bit = flip_bit(checkpoints[-1], step)
      print(f"[faults] flipped bit {bit} of byte {byte} of {file}", flush=True)


class _Source:
  """A source whose batches are bad where it was ordered."""

  def __init__(self, source: Any, faults: Faults):
    self._source, self._faults = source, faults

  def __call__(self, step: int, state: TrainState) -> Batch:
    batch = self._source(step, state)
    due = [fault for fault in self._faults.of(*_DATA) if self._faults.is_due(fault, step + 1)]
    time.sleep(sum(fault.seconds for fault in due if fault.kind == "slow_data"))
    if any(fault.kind == "nan_data" for fault in due):
      batch = batch._replace(weights=np.full_like(batch.weights, np.nan))
    return batch

  def samples(self, step: int) -> str:
    """Returns what the batch of a step is made of."""
    return self._source.samples(step)
