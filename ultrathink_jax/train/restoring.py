"""What a session begins with: the newest intact checkpoint of the run, or a first state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ultrathink_jax.config import Config
from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.logs import log
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.initializing import initialize_from
from ultrathink_jax.train.plan import Plan
from ultrathink_jax.train.progress import Progress
from ultrathink_jax.train.state import begin
from ultrathink_jax.types import TrainState


class Beginning(NamedTuple):
  """A state, how many steps are behind it, and where the run stands beside it."""

  state: TrainState
  step: int
  progress: Progress


def restore_or_begin(
  config: Config,
  plan: Plan,
  init: Callable[[], tuple[TrainState, Any]],
  checkpoints: Checkpoints,
  identity: dict[str, Any],
  allow_fresh_start: bool,
  before: int | None = None,
) -> Beginning:
  """Returns what the newest intact checkpoint holds, or what `init` and checkpoint.init_from make if there is none.

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
    return Beginning(_first_state(config, plan, init), 0, Progress())
  state, position = checkpoints.restore(newest, shapes_on(plan.shapes, plan.shardings))
  # A checkpoint that no step led to, as one made by mode import, has seen no data.
  changed = [key for key in identity if position.get(key, identity[key]) != identity[key]]
  if changed:
    key = changed[0]
    raise CheckpointError(
      f"checkpoint {newest} was trained on other data: {key} was {position.get(key)!r} and is {identity[key]!r}; "
      f"restore the data or choose another --workdir"
    )
  return Beginning(state, newest, Progress(**position.get("progress", {})))


def _first_state(config: Config, plan: Plan, init: Callable[[], tuple[TrainState, Any]]) -> TrainState:
  state = jax.jit(lambda: init()[0], out_shardings=plan.shardings)()
  if not config.checkpoint.init_from:
    return state
  params = initialize_from(Path(config.checkpoint.init_from), state.params, log)
  return jax.jit(lambda p: begin(config, p, plan.optimizer), out_shardings=plan.shardings)(params)
