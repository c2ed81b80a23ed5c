"""Makes steps with other processes until a signal stops all, and prints how many.

python -m tests.parallel.stopping_leg WORKDIR HANG_SECONDS, with the variables that make a process one of several.
"""

import os
import sys
import time
from pathlib import Path

from ultrathink_jax.interruption import Interruption


def main(workdir, hang_seconds):
  with Interruption() as interruption:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from ultrathink_jax.errors import Preempted
    from ultrathink_jax.parallel import processes
    from ultrathink_jax.train.supervisor import Supervisor

    with processes.joined(dict.fromkeys(processes.VARIABLES), os.environ, False, interruption):
      index = processes.process_index()
      with Supervisor(workdir, hang_seconds, interruption) as supervisor:
        multihost_utils.process_allgather(np.ones(1))  # compiles
        with supervisor.phase("train", "finish"):
          for step in range(100_000):
            if not supervisor.may_begin(step):
              break
            with supervisor.phase("data", "raise"):
              time.sleep(0.02 * (step % 3 == index))
            with supervisor.phase("step", "finish"):
              total = multihost_utils.process_allgather(np.full(1, step)).sum()
            assert total == step * jax.process_count()
            if index == 0 and step % 10 == 0:
              (workdir / "step").write_text(str(step))
            if os.environ.get("HANG") == f"{index}@{step}":
              time.sleep(1000)
          print(f"step {step}", flush=True)
          raise Preempted(f"{supervisor.requested()} after step {step}, which is saved")


if __name__ == "__main__":
  try:
    main(Path(sys.argv[1]), float(sys.argv[2]))
  except ValueError as error:
    from ultrathink_jax.errors import report

    sys.exit(report(error, False))
