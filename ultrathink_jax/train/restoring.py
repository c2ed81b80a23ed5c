"""What a session goes on from: the newest intact checkpoint of the run, or a first state."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.plan import Plan
from ultrathink_jax.train.progress import Progress
from ultrathink_jax.types import TrainState


class Restored(NamedTuple):
  """A state, how many steps are behind it, and where the run stands beside it."""

  state: TrainState
  step: int
  progress: Progress


def restore_or_begin(
  plan: Plan,
  first_state: Callable[[], TrainState],
  checkpoints: Checkpoints,
  identity: dict[str, Any],
  allow_fresh_start: bool,
  before: int | None = None,
) -> Restored:
  """Returns what the newest intact checkpoint holds, or the first state if there is none.

  `identity` is that of the data, which must be the checkpoint's. `allow_fresh_start` sets checkpoints aside if all of
  them are damaged. Only checkpoints of steps below `before` count.

  Raises:
    CheckpointError: all are damaged, or the newest was trained on other data.
  """
  try:
    newest = checkpoints.newest_intact(before)
  except CheckpointError:
    if not allow_fresh_start:
      raise
    checkpoints.set_aside_all()
    newest = None
  if newest is None:
    return Restored(first_state(), 0, Progress())
  state, position = checkpoints.restore(newest, shapes_on(plan.shapes, plan.shardings))
  # A checkpoint that no step led to, as one made by mode import, has seen no data.
  changed = [key for key in identity if position.get(key, identity[key]) != identity[key]]
  if changed:
    key = changed[0]
    kind, fix = "on other data", "restore the data"
    if key == "base":
      kind, fix = "over another base", "restore it, or name one checkpoint of it by checkpoint.init_from,"
    raise CheckpointError(
      f"checkpoint {newest} was trained {kind}: {key} was {position.get(key)!r} and is {identity[key]!r}; "
      f"{fix} or choose another --workdir"
    )
  return Restored(state, newest, Progress(**position.get("progress", {})))
