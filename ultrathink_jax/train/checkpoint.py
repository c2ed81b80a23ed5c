"""Checkpoints of a run: written in the background by Orbax, sealed with digests, and verified before they are read.

A checkpoint is a directory `checkpoints/STEP` with the items params, optimizer and position, and guard and averaged
where there are such, so that inference reads one alone.
"""

import contextlib
import json
import math
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ultrathink_jax.config import CheckpointConfig
from ultrathink_jax.errors import CheckpointError, NumericsError
from ultrathink_jax.parallel.processes import agreed, barrier, is_first
from ultrathink_jax.train.checkpoint_files import FORMAT, POSITION, CheckpointFiles, best_first, numbers
from ultrathink_jax.train.finite import require_finite
from ultrathink_jax.train.items import require_alike
from ultrathink_jax.train.storage_errors import describe
from ultrathink_jax.types import Parameters, TrainState

_MOST_RETRIES = 3
_BY_ANOTHER = "another process could not write"


class Checkpoints:
  """A context manager over the checkpoints of one run; leaving it waits for a commit under way.

  All processes of a run make the same calls. Without `config` it only reads. `best_is`, lowest or highest, says which
  of the values given to `save` is the best.
  """

  def __init__(
    self,
    directory: Path,
    config: CheckpointConfig | None = None,
    log: Callable[[str], None] = print,
    best_is: str = "lowest",
  ):
    self._config, self._log, self._best_is = config, log, best_is
    self._files = CheckpointFiles(directory, log)
    self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._commit: _Commit | None = None
    self._failures = 0  # saves in a row that failed
    self._retry_at = 0
    self._asked: tuple[int, bool] | None = None
    if config is not None:
      self._files.open()

  def steps(self) -> list[int]:
    """Returns the steps of all committed checkpoints, intact or not, in ascending order."""
    return self._files.steps()

  def newest_intact(self, before: int | None = None) -> int | None:
    """Returns the step of the newest checkpoint that is as it was written, None where there are no checkpoints.

    `before` leaves out those of this step and of later ones.

    Newer ones are damaged: each is named in a logged line and, where this object may write, moved to `damaged` beside
    the checkpoints, so that its step can be saved again.

    Raises:
      CheckpointError: all are damaged; they stay where they are.
    """
    self._collect(is_waiting=True)
    damaged: dict[int, str] = {}
    steps = self.steps() if before is None else [step for step in self.steps() if step < before]
    for step in reversed(steps):
      damage = self._files.find_damage(step)
      if damage is None:
        for bad, reason in damaged.items():
          self._log(f"[checkpoint] step {bad} is damaged: {reason}; going back to step {step}")
        if self._config is not None:
          self._files.set_aside(list(damaged))
        return step
      damaged[step] = damage
    if damaged:
      reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
      raise CheckpointError(
        f"no checkpoint in {self._files.directory} is intact: {reasons}; restore one from a copy, or train with "
        f"--allow_fresh_start, which moves them to {self._files.damaged} and begins anew"
      )
    return None

  def best_step(self) -> int | None:
    """Returns the step of the intact checkpoint with the best value, the first of equals, None where none has one."""
    self._collect(is_waiting=True)
    for step in best_first(self._files.values(self.steps()), self._best_is):
      damage = self._files.find_damage(step)
      if damage is None:
        return step
      self._log(f"[checkpoint] step {step}, the best, is damaged: {damage}; the next best is taken")
    return None

  def set_aside_all(self) -> None:
    """Moves all checkpoints to `damaged` beside them, so that a run can begin anew."""
    self._collect(is_waiting=True)
    self._files.set_aside(self.steps())

  def due(self, step: int) -> bool:
    """Returns whether to save after `step` steps: it is time, or a save that failed is to be made again.

    Raises:
      CheckpointError: saves failed too often in a row.
    """
    if self._asked is None or self._asked[0] != step:
      self._collect(is_waiting=False)
      is_retry = bool(self._failures) and step >= self._retry_at
      self._asked = (step, is_retry or step % self._config.every_steps == 0)
    return self._asked[1]

  def save(
    self,
    state: TrainState,
    step: int,
    position: dict[str, Any],
    value: float | None = None,
    averaged: Parameters | None = None,
  ) -> None:
    """Starts to write `state` after `step` steps with the data position; a commit still under way is waited for.

    It returns when the arrays are copied, so that the next step may take their memory. `value` is what the best
    checkpoint is chosen by, `averaged` the parameters that inference should read. A save that fails is logged and
    wanted again by `due`. A step that is there already is replaced if its position or value are others.

    Raises:
      CheckpointError: saves failed too often in a row.
      NumericsError: a number of the state, or `value`, is not finite; nothing is written.
    """
    self._collect(is_waiting=True)
    if value is not None and not math.isfinite(value):
      raise NumericsError(f"step {step} is not saved: its evaluate.best_metric is {value}")
    require_finite(step, {"params": state.params, "optimizer": state.opt_state, "averaged": averaged})
    record = json.loads(json.dumps({"format": FORMAT, "value": value, "position": position}))
    if self._files.record(step) == record:
      return
    trees = {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}
    trees |= {"guard": state.guard} if jax.tree.leaves(state.guard) else {}
    trees |= {} if averaged is None else {"averaged": averaged}
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items[POSITION] = ocp.args.JsonSave(record)
    need = f"{sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 2**20:.1f} MiB"
    problem = self._begin(step, ocp.args.Composite(**items), need)
    self._asked = None
    self._commit = _Commit(step, partial(self._finish, step, problem, need))
    self._commit.start()

  def restore(self, step: int, like: TrainState, fresh_guard: Any = None) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state, laid out as the shapes and shardings of `like`, and the data position.

    `fresh_guard`, by default zeros, is the guard's state for a checkpoint that was made without one.

    Raises:
      CheckpointError: the checkpoint is damaged or belongs to another model or optimizer.
    """
    self._collect(is_waiting=True)
    has_guard = (self._files.require_intact(step) / "guard").is_dir()
    trees = {"params": like.params, "optimizer": {"step": like.step, "state": like.opt_state}}
    restored = self._restore(step, trees | ({"guard": like.guard} if has_guard else {}))
    if has_guard:
      guard = restored["guard"]
    else:
      fresh = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.guard) if fresh_guard is None else fresh_guard
      guard = jax.tree.map(lambda shape, leaf: jax.device_put(leaf, shape.sharding), like.guard, fresh)
    optimizer = restored["optimizer"]
    state = TrainState(optimizer["step"], restored["params"], optimizer["state"], guard)
    return state, self._files.record(step)["position"]

  def position(self, step: int) -> dict[str, Any]:
    """Returns the data position saved with an intact checkpoint. Raises CheckpointError."""
    self._collect(is_waiting=True)
    self._files.require_intact(step)
    return self._files.record(step)["position"]

  def restore_params(self, step: int, like: Parameters, averaged: bool = True) -> Parameters:
    """Returns parameters alone, laid out as `like`: the averaged ones if wanted and there. Raises CheckpointError."""
    item = self.params_path(step, averaged).name
    return self._restore(step, {item: like})[item]

  def params_path(self, step: int, averaged: bool = True) -> Path:
    """Returns where an intact checkpoint has the parameters that `restore_params` reads. Raises CheckpointError."""
    self._collect(is_waiting=True)
    path = self._files.require_intact(step)
    return path / ("averaged" if averaged and (path / "averaged").is_dir() else "params")

  def wait(self) -> None:
    """Returns when the last save has been committed. Raises CheckpointError if it failed."""
    self._collect(is_waiting=True, is_last=True)

  def close(self) -> None:
    """Ends the work in the background. Raises CheckpointError if the last save failed."""
    try:
      self.wait()
    finally:
      self._checkpointer.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    with contextlib.suppress(CheckpointError) if error else contextlib.nullcontext():
      self.close()

  def _restore(self, step: int, trees: dict[str, Any]) -> Any:
    path = self._files.require_intact(step)
    for name, tree in trees.items():
      require_alike(path / name, tree)
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in trees.items()})
    try:
      return self._checkpointer.restore(path, args=args)
    except Exception as error:  # as when saving
      raise CheckpointError(f"checkpoint {path} cannot be read: {describe(error)}; take another step") from error

  def _begin(self, step: int, items: ocp.args.Composite, need: str) -> str | None:
    """Copies what is to be saved and starts to write it; returns what went wrong."""
    problem = None
    if is_first():
      try:
        self._files.try_staging()
      except OSError as error:
        problem = self._explain(error, need)
    if not agreed(f"checkpoint/{next(numbers)}", problem is None):
      return problem or _BY_ANOTHER
    try:
      self._checkpointer.save(self._files.staged(step), args=items, force=True)
    except Exception as error:  # Orbax and TensorStore raise many kinds
      return self._explain(error, need)
    return None

  def _finish(self, step: int, problem: str | None, need: str, name: str) -> str | None:
    """Commits what Orbax writes, in all processes or in none; returns what went wrong.

    It runs in the background. `name` is for the processes to meet under.
    """
    try:
      if problem is None:
        self._checkpointer.wait_until_finished()
        self._files.digest(step)
    except Exception as error:  # as when it began
      problem = self._explain(error, need)
    barrier(f"{name}/digested")
    if is_first():
      try:
        if problem is None:
          self._files.publish(step, self._config, self._best_is)
      except OSError as error:
        problem = self._explain(error, need)
      self._files.clear_staging()
    return None if agreed(f"{name}/published", problem is None) else problem or _BY_ANOTHER

  def _collect(self, is_waiting: bool, is_last: bool = False) -> None:
    """Takes notice of how the commit under way ended, once it has or when it has been waited for."""
    commit = self._commit
    if commit is not None and (is_waiting or agreed(f"checkpoint/{next(numbers)}", not commit.is_alive())):
      commit.join()
      self._commit = None
      self._failures = self._failures + 1 if commit.problem else 0
      if self._failures:
        self._problem = f"step {commit.step} could not be saved in {self._files.directory}: {commit.problem}"
        if self._failures <= _MOST_RETRIES and not is_last:
          # The first retry comes at once, the others over the rest of the interval.
          wait = 1 if self._failures == 1 else math.ceil(self._config.every_steps / (_MOST_RETRIES + 1))
          self._retry_at = commit.step + wait
          self._log(f"[checkpoint] {self._problem}; retry {self._failures} of {_MOST_RETRIES} at step {self._retry_at}")
    if self._failures > _MOST_RETRIES or (is_last and self._failures):
      raise CheckpointError(f"{self._problem}; make room there, make it writable, or choose another --workdir")

  def _explain(self, error: Exception, need: str) -> str:
    """Returns why a save failed, and the space that it needs and has."""
    reason = describe(error)
    with contextlib.suppress(OSError):
      free = shutil.disk_usage(self._files.directory).free
      reason += f" (it needs up to {need}, {free / 2**20:.1f} MiB are free)"
    return reason


class _Commit(threading.Thread):
  """The background part of one save, and what went wrong in it."""

  def __init__(self, step: int, finish: Callable[[str], str | None]):
    super().__init__(name=f"commit of step {step}", daemon=True)
    self.step = step
    self.problem: str | None = "it was not finished"
    self._finish, self._meet_under = finish, f"checkpoint/{next(numbers)}"

  def run(self) -> None:
    self.problem = self._finish(self._meet_under)


def shapes_on(tree: Any, shardings: Any) -> Any:
  """Returns the shapes of `tree` with the given layout, to restore into."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
