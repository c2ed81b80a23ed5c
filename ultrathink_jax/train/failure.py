"""Steps in a row that the guard refused, and what is to be said of them."""

from typing import Any, NamedTuple

import numpy as np


class Failure(NamedTuple):
  """The last of the steps, how many they are, and what is not finite in it."""

  step: int
  in_a_row: int
  parts: tuple[str, ...]

  @property
  def first_step(self) -> int:
    return self.step - self.in_a_row + 1

  def explain(self, samples: str, num_rollbacks: int) -> str:
    """Returns the line that ends a run; `samples` are those of the first of the steps."""
    again = f" after going back {num_rollbacks} times" if num_rollbacks else ""
    where = f"not finite in {', '.join(self.parts)}" if self.parts else "far above what it was"
    return (
      f"loss or gradient of {self.in_a_row} steps in a row{again}, from step {self.first_step} on, is {where}; step "
      f"{self.first_step} reads {samples}; nothing of it is saved: resume with a lower optimizer.learning_rate or "
      f"optimizer.clip_norm, another train.seed, or without these data"
    )


def find_failure(step: int, sums: dict[str, Any], most: int) -> Failure | None:
  """Returns the failure that the metrics of a step complete, None before `most` steps in a row."""
  if int(sums["skipped_in_a_row"]) < most:
    return None
  names = [name for name in sums if name.startswith(("grad_norm/", "loss/"))]
  bad = (name.removeprefix("grad_norm/") for name in names if not np.isfinite(sums[name]))
  return Failure(step, int(sums["skipped_in_a_row"]), tuple(bad))
