"""Real processes that exchange something in every step, and what signals and hangs of some of them do to all."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.xdist_group("processes")


def start(workdir, hang_seconds=0.0, **variables):
  """Returns two processes that are making steps."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": "", **variables}
  command = [sys.executable, "-m", "tests.parallel.stopping_leg", str(workdir), str(hang_seconds)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  started = [
    subprocess.Popen(command, cwd=ROOT, env=os.environ | common | {"JAX_PROCESS_ID": str(index)}, **pipes)
    for index in range(2)
  ]
  deadline = time.monotonic() + 100
  while not (workdir / "step").exists():
    assert all(process.poll() is None for process in started), [process.communicate() for process in started]
    assert time.monotonic() < deadline
    time.sleep(0.05)
  time.sleep(0.5)
  return started


def end(started):
  """Returns the exit codes, outputs and errors, within 15 s."""
  said = [process.communicate(timeout=15) for process in started]
  return [process.returncode for process in started], [out for out, _ in said], [error for _, error in said]


@pytest.mark.parametrize(
  ("signalled", "number"),
  [
    ([1], signal.SIGTERM),
    pytest.param([0], signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param([0, 1], signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param([1], signal.SIGINT, marks=pytest.mark.slow),
  ],
)
def test_all_stop_after_the_same_step_whoever_is_signalled(tmp_path, signalled, number):
  started = start(tmp_path)
  for index in signalled:
    started[index].send_signal(number)
  codes, outputs, errors = end(started)
  assert codes == [75, 75], errors
  steps = {output.splitlines()[-1] for output in outputs}
  assert len(steps) == 1
  assert int(steps.pop().split()[1]) > 5
  for error in errors:
    assert f"stopped: {number.name} after step" in error.splitlines()[-1]
    assert "error" not in error


@pytest.mark.slow
def test_a_second_signal_to_one_ends_all(tmp_path):
  started = start(tmp_path, HANG="0@40")
  time.sleep(3)  # until it stands still
  started[1].send_signal(signal.SIGTERM)
  time.sleep(0.5)
  started[1].send_signal(signal.SIGTERM)
  begun = time.monotonic()
  codes, _, errors = end(started)
  assert codes == [143, 143], errors
  assert time.monotonic() - begun < 3
  assert "peer 1 of 2" in errors[0].splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_hangs_in_its_own_work_leaves_the_stacks_of_all(tmp_path):
  started = start(tmp_path, 3.0, HANG="1@40")
  codes, _, errors = end(started)
  assert codes == [6, 6], errors
  assert any("made no progress" in error.splitlines()[-1] for error in errors)
  assert "time.sleep(1000)" not in (tmp_path / "hang-0.txt").read_text()
  assert "step 41" in (tmp_path / "hang-1.txt").read_text()  # the one that did not come
  assert "step 42" in (tmp_path / "hang-0.txt").read_text()
