"""The service by which JAX's processes meet, in a process of its own."""

import json
import subprocess
import sys
from typing import Any

from ultrathink_jax.errors import PeerError


class ServiceProcess:
  """JAX's coordination service in a process of its own, which outlives this one by some seconds."""

  _PROGRAM = """
import json, sys, time
from jaxlib import _jax
args, kwargs = json.loads(sys.argv[1])
service = _jax.get_distributed_runtime_service(*args, **kwargs)
print("listening", flush=True)
if not sys.stdin.read():
  time.sleep(5)
"""

  def __init__(self, *args: Any, **kwargs: Any):
    self._process = subprocess.Popen(
      [sys.executable, "-c", self._PROGRAM, json.dumps([args, kwargs])],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,  # Ctrl-C is not for it
    )
    if not self._process.stdout.readline():
      raise PeerError(f"process 0 cannot listen at {args[0]}; give --coordinator another port")

  def shutdown(self) -> None:
    self._process.communicate(b"done")
