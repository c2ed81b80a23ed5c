"""Checkpoints of a run: parameters, optimizer state and data position, committed whole by Orbax.

A checkpoint is a directory `checkpoints/STEP` with three items, so that inference reads `params` alone.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.types import Parameters, TrainState

logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
  """A context manager over the checkpoints of one run; leaving it waits for a commit under way."""

  def __init__(self, directory: Path, keep_last: int | None = None):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, enable_async_checkpointing=True)
    self._directory = directory.resolve()
    self._manager = ocp.CheckpointManager(
      self._directory, options=options, item_names=("params", "optimizer", "position")
    )

  def latest_step(self) -> int | None:
    """Returns the step of the newest committed checkpoint."""
    return self._manager.latest_step()

  def save(self, state: TrainState, step: int, position: dict[str, Any]) -> None:
    """Starts to write `state` after `step` steps with the data position; a commit still under way is waited for."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
        position=ocp.args.JsonSave(position),
      ),
    )

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state, laid out as the shapes and shardings of `like`, and the data position.

    Raises:
      CheckpointError: the checkpoint is damaged or belongs to another model or optimizer.
    """
    restored = self._restore(
      step,
      params=ocp.args.StandardRestore(like.params),
      optimizer=ocp.args.StandardRestore({"step": like.step, "state": like.opt_state}),
      position=ocp.args.JsonRestore(),
    )
    optimizer = restored["optimizer"]
    return TrainState(optimizer["step"], restored["params"], optimizer["state"]), restored["position"]

  def restore_params(self, step: int, like: Parameters) -> Parameters:
    """Returns the parameters alone, laid out as the shapes and shardings of `like`. Raises CheckpointError."""
    return self._restore(step, params=ocp.args.StandardRestore(like))["params"]

  def wait(self) -> None:
    """Returns when every save has been committed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _restore(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged or foreign checkpoint
      reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
      raise CheckpointError(
        f"checkpoint {self._directory / str(step)} cannot be read: {reason[:300]}; "
        f"if an older step stands beside it, remove this one to resume from there"
      ) from error


def shapes_on(tree: Any, shardings: Any) -> Any:
  """Returns the shapes of `tree` with the given layout, to restore into."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
