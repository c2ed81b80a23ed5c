"""When a training loop is told to stop, and when it is taken to hang."""

import subprocess
import sys
from pathlib import Path

import pytest

from ultrathink_jax.interruption import Interruption
from ultrathink_jax.train import supervisor
from ultrathink_jax.train.supervisor import Supervisor

ROOT = Path(__file__).parent.parent.parent
HANG = """
import sys, time
from pathlib import Path
from ultrathink_jax.train.supervisor import Supervisor

def wait_for_ever():
  time.sleep(60)

with Supervisor(Path(sys.argv[1]), hang_seconds=1.0) as watched:
  with watched.phase("train", "finish"):
    for step in range(3):
      watched.may_begin(step)
      with watched.phase("step", "finish"):
        time.sleep(0.7)
    watched.may_begin(3)
    wait_for_ever()
"""


def test_a_run_that_hangs_ends_with_its_stacks_and_says_where_it_was(tmp_path):
  program = subprocess.run([sys.executable, "-c", HANG, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert program.returncode == 6
  line = program.stderr.splitlines()[-1]
  assert line.startswith("error: process 0 made no progress for ")
  assert "in train, step 4" in line
  assert str(tmp_path / "hang-0.txt") in line
  stacks = (tmp_path / "hang-0.txt").read_text()
  assert "in wait_for_ever" in stacks
  assert "in wait_for_ever" in program.stderr
  assert "phase train, step 4" in stacks


@pytest.fixture
def clock(monkeypatch):
  """Returns a list whose only entry is the time."""
  now = [0.0]
  monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
  return now


def limits(watched, clock, name, *seconds):
  """Returns the limits under which phases of the given lengths ran."""
  found = []
  for length in seconds:
    with watched.phase(name, "finish"):
      found.append(watched._watchdog._beat.limit_seconds)
      clock[0] += length
  return found


def test_a_step_may_take_ten_times_what_is_usual_and_half_a_minute_at_least(tmp_path, clock):
  watched = Supervisor(tmp_path)
  assert limits(watched, clock, "step", 100, 50, 0.1, 0.2, 0.1) == [600, 600, 600, 30, 30]  # the first ones are not
  assert limits(watched, clock, "step", *[20] * 9)[-1] == 200
  assert limits(watched, clock, "train", 1) == [200]


def test_hang_seconds_stand_for_what_is_learned(tmp_path, clock):
  assert limits(Supervisor(tmp_path, 7), clock, "step", *[1] * 9) == [7] * 9
  assert limits(Supervisor(tmp_path, 7), clock, "save", 1) == [600]
  assert limits(Supervisor(tmp_path, 7000), clock, "data", 1) == [7000]


def test_compiling_may_take_any_time_and_so_may_the_first_evaluation(tmp_path, clock):
  watched = Supervisor(tmp_path)
  assert limits(watched, clock, "compile", 1) == [None]
  assert limits(watched, clock, "evaluate", 100, 20, 20) == [None, 1000, 1000]


def test_an_inner_phase_gives_the_limit_of_the_outer_one_back(tmp_path, clock):
  watched = Supervisor(tmp_path, 7)
  with watched.phase("train", "finish"):
    limits(watched, clock, "save", 1)
    assert watched._watchdog._beat.what == "train"
    assert watched._watchdog._beat.limit_seconds == 7
    with pytest.raises(KeyError), watched.phase("evaluate", "raise"):
      raise KeyError
    assert watched._watchdog._beat.what == "train"


def test_a_process_alone_goes_on_until_a_signal_came(tmp_path):
  interruption = Interruption()
  watched = Supervisor(tmp_path, interruption=interruption)
  assert watched.may_begin(0)
  assert watched.requested() is None
  interruption._requested = "SIGTERM"
  assert not watched.may_begin(1)
  assert watched.requested() == "SIGTERM"
