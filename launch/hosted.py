"""Runs the program in a container of Vertex AI or SageMaker, whose ways to tell the machines apart it translates.

python launch/hosted.py [--dry-run] --config=configs/ultra3b.py --workdir=DIR
"""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

_SAGEMAKER = Path("/opt/ml/input/config/resourceconfig.json")
_SAGEMAKER_PORT = 8482


def variables(environment: Mapping[str, str], sagemaker: Path = _SAGEMAKER) -> dict[str, str]:
  """Returns the environment that makes this machine one of the job's; empty where it is the only one."""
  if "CLUSTER_SPEC" in environment:  # Vertex AI
    spec = json.loads(environment["CLUSTER_SPEC"])
    pools = sorted(spec["cluster"].items())
    machines = [(pool, index) for pool, addresses in pools for index in range(len(addresses))]
    coordinator, position = pools[0][1][0], machines.index((spec["task"]["type"], int(spec["task"]["index"])))
  elif sagemaker.exists():
    spec = json.loads(sagemaker.read_text())
    machines = sorted(spec["hosts"])
    coordinator, position = f"{machines[0]}:{_SAGEMAKER_PORT}", machines.index(spec["current_host"])
  else:
    machines = []
  if len(machines) < 2:
    return {}
  return {
    "JAX_COORDINATOR_ADDRESS": coordinator,
    "JAX_NUM_PROCESSES": str(len(machines)),
    "JAX_PROCESS_ID": str(position),
  }


def main(argv: list[str]) -> None:
  """Becomes the program."""
  arguments = [argument for argument in argv if argument != "--dry-run"]
  found, command = variables(os.environ), [sys.executable, "-m", "ultrathink_jax.main", *arguments]
  if "--dry-run" in argv:
    print(shlex.join([*(f"{name}={value}" for name, value in found.items()), *command]))
  else:
    os.execve(sys.executable, command, {**os.environ, **found})


if __name__ == "__main__":
  main(sys.argv[1:])
