"""Where a run stands beside its state, and what may end it early."""

import math
from typing import NamedTuple

from ultrathink_jax.config import EvaluateConfig
from ultrathink_jax.train.checkpoint import Checkpoints


class Progress(NamedTuple):
  """What a checkpoint holds beside the state.

  Attributes:
    data_offset: batches left out by going back: step s reads batch s + data_offset.
    evaluated: the step of the last evaluation.
    best: the best value of evaluate.best_metric so far.
    best_step: the step it was evaluated at.
    worse: evaluations since without a better one.
    has_ended: whether training ended early.
  """

  data_offset: int = 0
  evaluated: int = 0
  best: float | None = None
  best_step: int | None = None
  worse: int = 0
  has_ended: bool = False

  def after_evaluation(self, config: EvaluateConfig, step: int, value: float) -> "Progress":
    """Returns the progress after an evaluation at `step`; a value that is not finite is never better."""
    sign = 1 if config.best_is == "lowest" else -1
    is_better = math.isfinite(value) and (self.best is None or sign * (self.best - value) > config.min_delta)
    if is_better:
      return self._replace(best=value, best_step=step, worse=0)
    return self._replace(worse=self.worse + 1, has_ended=0 < config.patience <= self.worse + 1)


def result_step(checkpoints: Checkpoints) -> int | None:
  """Returns the step whose parameters are what a run came to: the newest, or the best where training ended early."""
  newest = checkpoints.newest_intact()
  if newest is None:
    return None
  progress = Progress(**checkpoints.position(newest).get("progress", {}))
  return progress.best_step if progress.has_ended else newest
