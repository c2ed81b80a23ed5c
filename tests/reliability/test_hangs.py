"""Runs that hang or are held twice; peers that are lost: tests/test_processes.py."""

import time

import pytest

from tests.reliability import runs

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.reliability, pytest.mark.slow]
STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return runs.make_config(tmp_path_factory.mktemp("text"), STEPS)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """Returns the workdir of the run that nothing happens to."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  runs.run(config, workdir)
  return workdir


def test_a_run_that_hangs_is_ended_with_its_stacks_and_goes_on_under_the_launcher(config, whole, tmp_path):
  workdir = tmp_path / "run"
  options = ["--processes=1", "--max_restarts=2"]
  program = runs.start(config, workdir, "--config.train.hang_seconds=4", faults="hang@13", launcher=options)
  _, error = program.communicate(timeout=120)
  assert program.returncode == 0, error
  assert "error: process 0 made no progress for" in error
  assert "in train, step 13" in error
  assert "[launch] ended with exit code 6; restart 1 of 2" in error
  assert "before_step" in (workdir / "hang-0.txt").read_text()
  assert runs.curve(workdir) == runs.curve(whole)


def test_faults_of_every_kind_leave_a_run_under_the_launcher_as_it_would_have_been(config, whole, tmp_path):
  workdir = tmp_path / "run"
  faults = "kill@8,sigterm@14,flip@19,kill@19,disk_full@25,sigusr1@27"
  program = runs.start(config, workdir, faults=faults, launcher=["--processes=1", "--max_restarts=9"])
  output, error = program.communicate(timeout=200)
  assert program.returncode == 0, error
  assert error.count("[launch]") == 4
  assert "damaged" in output
  assert runs.curve(workdir) == runs.curve(whole)


def test_a_second_run_in_a_workdir_is_refused_at_once(config, tmp_path):
  first = runs.start(config, tmp_path / "run", "--config.train.steps=100000")
  runs.wait_until(first, lambda: len(runs.rows(tmp_path / "run")) >= 3)
  second = runs.start(config, tmp_path / "run", "--config.train.steps=100000")
  begun = time.monotonic()
  _, error = second.communicate(timeout=60)
  assert second.returncode == 2
  assert f"is in use by process {first.pid} on " in error.splitlines()[-1]
  assert time.monotonic() - begun < 20
  first.terminate()
  first.communicate(timeout=20)
  assert first.returncode == 75
