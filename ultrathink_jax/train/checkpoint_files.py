"""The directory of checkpoints: what is committed in it, whether it is intact, and what of it stays.

A checkpoint is made in `saving` and renamed when it is whole, digests included: what is under a step's name is
committed. Processes of a run share the directory and make the same calls.
"""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from ultrathink_jax.config import CheckpointConfig
from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.parallel.processes import barrier, is_first, num_processes, process_index
from ultrathink_jax.train import digests

FORMAT = 2  # 1: no digests, and the item `position` is the position itself
_CLEARINGS, _CLEARING_SECONDS = 10, 0.05
POSITION = "position"  # the item that says what a checkpoint is
numbers = itertools.count()  # for the names that processes meet under


class CheckpointFiles:
  """The checkpoints in a directory, and their common `staging` place."""

  def __init__(self, directory: Path, log: Callable[[str], None]):
    self.directory, self._log = directory.resolve(), log
    self.staging = self.directory / "saving"
    self.damaged = self.directory.parent / "damaged"
    self._intact: set[int] = set()  # steps that need not be verified again

  def path(self, step: int) -> Path:
    return self.directory / str(step)

  def staged(self, step: int) -> Path:
    return self.staging / str(step)

  def open(self) -> None:
    """Removes what killed saves left, and takes back a checkpoint that one of them was about to replace."""
    if is_first():
      try:
        self.directory.mkdir(parents=True, exist_ok=True)
      except OSError as error:
        raise CheckpointError(
          f"{self.directory} cannot be made: {error.strerror}; make its parent writable or choose another --workdir"
        ) from error
      with contextlib.suppress(OSError):  # what is left does no harm
        for replaced in self.staging.glob("replaced-*"):
          target = self.directory / replaced.name.removeprefix("replaced-")
          if not target.exists():
            replaced.rename(target)
      for leftover in (self.staging, *self.directory.glob("*.orbax-checkpoint-tmp*")):
        shutil.rmtree(leftover, ignore_errors=True)
    barrier(f"checkpoint/{next(numbers)}")

  def steps(self) -> list[int]:
    """Returns the steps of all committed checkpoints, in ascending order, as the first process sees them."""
    found: list[int] = []
    if self.directory.is_dir():
      found = sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir())
    return [int(step) for step in _told_by_all(" ".join(map(str, found)))[0].split()]

  def record(self, step: int) -> dict[str, Any] | None:
    """Returns format, value and position of a checkpoint, None where they cannot be read."""
    try:
      record = json.loads((self.path(step) / POSITION / "metadata").read_bytes())
    except (OSError, ValueError):
      return None
    if not isinstance(record, dict):
      return None
    return record if "format" in record else {"format": 1, "value": None, "position": record}

  def values(self, steps: list[int]) -> dict[int, float | None]:
    """Returns what the best of `steps` are chosen by."""
    return {step: (self.record(step) or {}).get("value") for step in steps}

  def find_damage(self, step: int) -> str | None:
    """Returns what is wrong with a checkpoint, the same in all processes, which share the work; None if it is intact.

    One of an older version, which has no digests, passes, and a logged line says so.
    """
    if step in self._intact:
      return None
    path = self.path(step)
    if (path / digests.MANIFEST).exists():
      damage = digests.find_damage(path, process_index(), num_processes())
    elif (record := self.record(step)) is not None and record["format"] == 1:
      self._log(f"[checkpoint] step {step} was made by an older version, without digests: it cannot be verified")
      damage = None
    else:
      damage = f"{digests.MANIFEST} is missing"
    damage = next(filter(None, _told_by_all(damage or "")), None)
    if damage is None:
      self._intact.add(step)
    return damage

  def require_intact(self, step: int) -> Path:
    """Returns the directory of a checkpoint that is there, intact and readable. Raises CheckpointError otherwise."""
    path, steps = self.path(step), self.steps()
    if step not in steps:
      raise CheckpointError(f"{path} does not exist; there are steps: {', '.join(map(str, steps)) or 'none'}")
    if damage := self.find_damage(step):
      raise CheckpointError(f"checkpoint {path} is damaged: {damage}; take another step, or restore it from a copy")
    number = (self.record(step) or {}).get("format")
    if number not in range(1, FORMAT + 1):
      raise CheckpointError(f"checkpoint {path} has format {number!r}, made by a newer version; update ultrathink_jax")
    return path

  def set_aside(self, steps: list[int]) -> None:
    """Moves checkpoints to `damaged`. Raises CheckpointError where that is not possible."""
    try:
      for step in steps if is_first() else ():
        self.damaged.mkdir(exist_ok=True)
        names = itertools.chain([f"{step}"], (f"{step}-{number}" for number in itertools.count(2)))
        self.path(step).rename(next(path for name in names if not (path := self.damaged / name).exists()))
    except OSError as error:
      raise CheckpointError(
        f"{self.directory} has damaged checkpoints that cannot be moved to {self.damaged}: {error.strerror}; make both "
        f"directories writable"
      ) from error
    barrier(f"checkpoint/{next(numbers)}")
    self._intact.difference_update(steps)

  def try_staging(self) -> None:
    """Raises OSError where nothing can be written, which Orbax would find out with more noise."""
    self.staging.mkdir(exist_ok=True)
    trial = self.staging / "trial"
    trial.write_bytes(bytes(4096))
    trial.unlink()

  def digest(self, step: int) -> None:
    """Writes down the digests of this process's share of the files of a staged checkpoint. Raises OSError."""
    lines = digests.read_files(self.staged(step), process_index(), num_processes())
    (self.staging / f"digests-{process_index()}").write_text("".join(lines))

  def publish(self, step: int, config: CheckpointConfig, best_is: str) -> None:
    """Seals and commits a checkpoint that all processes have digested, and deletes those that need not stay.

    For the first process, which it is enough to call it in. Raises OSError.
    """
    shares = [self.staging / f"digests-{index}" for index in range(num_processes())]
    if absent := [index for index, path in enumerate(shares) if not path.exists()]:
      raise OSError(f"process {absent[0]} could not write")
    digests.seal(self.staged(step), itertools.chain.from_iterable(path.read_text().splitlines(True) for path in shares))
    self._intact.discard(step)
    if self.path(step).exists():
      self.path(step).rename(self.staging / f"replaced-{step}")
    self.staged(step).rename(self.path(step))
    steps = [int(path.name) for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir()]
    values = self.values(steps)
    for old in values.keys() - kept_steps(config, values, best_is):
      with contextlib.suppress(OSError):  # the next save tries again
        self.path(old).rename(self.staging / f"old-{old}")  # so that there is never half a checkpoint under its name

  def clear_staging(self) -> None:
    """Deletes what is not committed; for the first process."""
    for _ in range(_CLEARINGS):  # after an item has failed, those beside it may still be making files
      shutil.rmtree(self.staging, ignore_errors=True)
      if not self.staging.exists():
        return
      time.sleep(_CLEARING_SECONDS)


def kept_steps(config: CheckpointConfig, values: Mapping[int, float | None], best_is: str) -> set[int]:
  """Returns which of the steps with these values stay: the last, the best and the multiples."""
  steps = sorted(values)
  multiples = (step for step in steps if config.keep_every_steps and step % config.keep_every_steps == 0)
  return {*steps[-config.keep_last :], *best_first(values, best_is)[: config.keep_best], *multiples}


def best_first(values: Mapping[int, float | None], best_is: str) -> list[int]:
  """Returns the steps that have a value, better ones first, and of equal ones the earlier first."""
  sign = 1 if best_is == "lowest" else -1
  return sorted((step for step in values if values[step] is not None), key=lambda step: (sign * values[step], step))


def _told_by_all(text: str) -> list[str]:
  """Returns what each process says, in all of them."""
  if num_processes() == 1:
    return [text]
  letters = np.frombuffer(text.encode()[:4096].ljust(4096, b"\0"), np.uint8)
  return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(letters)]
