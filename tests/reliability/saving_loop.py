"""Saves every step from the newest intact checkpoint on and prints each that is committed, until it is killed.

python -m tests.reliability.saving_loop DIRECTORY
"""

import sys
from pathlib import Path

from tests.train.saving import settings, state_at
from ultrathink_jax.train.checkpoint import Checkpoints

SIZE = 20_000


def run(directory: Path) -> None:
  with Checkpoints(directory, settings(keep_last=2)) as checkpoints:
    step = checkpoints.newest_intact() or 0
    while True:
      print(max(checkpoints.steps(), default=0), flush=True)
      step += 1
      checkpoints.save(state_at(step, SIZE), step, {"step": step})  # waits for the one before


if __name__ == "__main__":
  run(Path(sys.argv[1]))
