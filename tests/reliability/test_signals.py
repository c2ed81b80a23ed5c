"""Signals at any time: the run ends soon, with code 75, and the same command makes the run it would have been."""

import random
import re
import signal
import time

import pytest

from tests.reliability import runs

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.reliability]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STEPS = 400
STALLS = f"slow_data@1-{STEPS}:0.03,slow_disk@1-{STEPS}:0.1"  # so that signals come in every phase


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return runs.make_config(tmp_path_factory.mktemp("text"), STEPS)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """Returns the workdir of the run that nobody interrupts."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  runs.run(config, workdir)
  return workdir


def interrupt(program, number, wait):
  """Signals a program `wait` seconds after it can be; returns its exit code, what it said and how long it took."""
  runs.wait_until(program, lambda: runs.catches(program, number))
  time.sleep(wait)
  begun = time.monotonic()
  program.send_signal(number)
  output, error = program.communicate(timeout=30)
  return program.returncode, f"{output}\n{error}", time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_signals_at_random_times_leave_the_run_as_it_would_have_been(config, whole, tmp_path):
  chance = random.Random(7)
  phases = []
  for count in range(20):
    number = chance.choice(SIGNALS)
    with pytest.MonkeyPatch.context() as patch:
      if count % 5 == 0:  # a first compilation, which takes its time
        patch.setenv("ULTRATHINK_CACHE_DIR", str(tmp_path / f"cache{count}"))
      program = runs.start(config, tmp_path / "run", faults=STALLS)
    code, said, seconds = interrupt(program, number, chance.uniform(0, 9))
    assert code == 75, said
    assert seconds < 15
    last = said.splitlines()[-1]
    phases += re.findall(r"^\[stop\] \w+ in phase (\w+)", said, re.MULTILINE)
    assert last.startswith(f"stopped: {number.name}"), said
    if "after step" in last:
      step = int(re.search(r"after step (\d+)", last)[1])
      assert runs.saved_steps(tmp_path / "run")[-1] == step, said
      assert sorted(runs.curve(tmp_path / "run")[0])[-1] == step
  output = runs.run(config, tmp_path / "run", faults=STALLS)
  assert "[resume] from step" in output
  assert len(set(phases)) > 1, phases
  assert runs.curve(tmp_path / "run") == runs.curve(whole)


CASES = {  # a fault that holds a run in a phase, how many steps have been logged then, and how many made
  "data": ("slow_data@13:60", 11, 12),
  "save": ("slow_disk@10:3", 10, 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", CASES)
def test_a_signal_in_a_stall_or_a_save_ends_the_run_at_the_step_it_has_reached(config, tmp_path, phase, number):
  faults, logged, saved = CASES[phase]
  program = runs.start(config, tmp_path / "run", faults=faults)
  runs.wait_until(program, lambda: len(runs.rows(tmp_path / "run")) >= logged)
  time.sleep(1)
  begun = time.monotonic()
  program.send_signal(number)
  _, error = program.communicate(timeout=20)
  assert program.returncode == 75, error
  assert time.monotonic() - begun < 8
  assert error.splitlines()[-1].startswith(f"stopped: {number.name} after step {saved},")
  assert runs.saved_steps(tmp_path / "run")[-1] == saved


@pytest.mark.slow
def test_a_second_signal_in_a_save_ends_the_run_at_once_and_leaves_the_checkpoints_before(config, whole, tmp_path):
  program = runs.start(config, tmp_path / "run", faults="slow_disk@10:20")
  runs.wait_until(program, lambda: len(runs.rows(tmp_path / "run")) >= 10)
  time.sleep(1)
  program.send_signal(signal.SIGTERM)
  time.sleep(0.5)
  begun = time.monotonic()
  program.send_signal(signal.SIGTERM)
  _, error = program.communicate(timeout=10)
  assert program.returncode == 143, error
  assert time.monotonic() - begun < 2
  output = runs.run(config, tmp_path / "run")
  assert "[resume] from step 5 " in output
  assert runs.curve(tmp_path / "run") == runs.curve(whole)
