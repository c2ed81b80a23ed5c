"""What the local launcher does when a run ends: a program of a few lines stands for the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """#!{python}
import json, os, pathlib, signal, sys, time
folder, plan = pathlib.Path(sys.argv[3]), json.loads(sys.argv[4])
number = len(list(folder.glob("run-*")))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(folder / f"run-{{number}}").write_text(os.environ["ULTRATHINK_LAUNCHER"])
what = plan[number]
if what == "wait":
  time.sleep(30)
elif what < 0:
  os.kill(os.getpid(), -what)
sys.exit(what)
"""
LAUNCHER = """
import sys
sys.path.insert(0, "launch")
import local
sys.executable = sys.argv.pop(1)
local._SHORT_SECONDS = float(sys.argv.pop(1))
sys.exit(local.main())
"""


def start(folder, plan, max_restarts, short_seconds=0):
  """Returns a launcher of a program whose runs end, one after another, with the codes of `plan`."""
  program = folder / "program"
  program.write_text(PROGRAM.format(python=sys.executable))
  program.chmod(0o755)
  options = ["--processes=1", f"--max_restarts={max_restarts}", "--", str(folder), json.dumps(plan)]
  return subprocess.Popen(
    [sys.executable, "-c", LAUNCHER, str(program), str(short_seconds), *options],
    cwd=ROOT, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def num_runs(folder):
  return len(list(folder.glob("run-*")))


def wait_for_run(folder, number):
  deadline = time.monotonic() + 20
  while num_runs(folder) < number:
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_a_run_that_is_lost_stopped_or_killed_starts_again_until_it_is_done(tmp_path):
  launcher = start(tmp_path, [6, 75, -9, -11, 0], 10)
  _, error = launcher.communicate(timeout=30)
  assert launcher.returncode == 0
  assert error.splitlines() == [
    "[launch] ended with exit code 6; restart 1 of 10",
    "[launch] ended with exit code 75; restart 2 of 10",
    "[launch] ended with SIGKILL; restart 3 of 10",
    "[launch] ended with SIGSEGV; restart 4 of 10",
  ]
  assert (tmp_path / "run-0").read_text() == str(launcher.pid)


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
def test_what_another_try_would_not_mend_ends_the_launcher(tmp_path, code):
  launcher = start(tmp_path, [75, code], 10)
  launcher.communicate(timeout=30)
  assert launcher.returncode == code
  assert num_runs(tmp_path) == 2


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (-9, 137)])
def test_there_are_as_many_restarts_as_were_allowed(tmp_path, code, expected):
  launcher = start(tmp_path, [code] * 3, 2)
  launcher.communicate(timeout=30)
  assert launcher.returncode == expected
  assert num_runs(tmp_path) == 3


def test_the_pause_grows_while_runs_are_short(tmp_path):
  begun = time.monotonic()
  launcher = start(tmp_path, [75, 75, 0], 10, short_seconds=60)
  _, error = launcher.communicate(timeout=30)
  assert [line.rpartition(" of 10")[2] for line in error.splitlines()] == [" in 1 s", " in 2 s"]
  assert time.monotonic() - begun > 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_stops_the_run_for_good(tmp_path, number):
  if signal.getsignal(number) is signal.SIG_IGN:
    pytest.skip("these tests run under nohup, and so would the launcher")
  launcher = start(tmp_path, [75, "wait", 0], 10)
  wait_for_run(tmp_path, 2)
  launcher.send_signal(number)
  launcher.communicate(timeout=10)
  assert launcher.returncode == 75
  assert num_runs(tmp_path) == 2


def test_a_signal_in_the_pause_ends_the_launcher(tmp_path):
  launcher = start(tmp_path, [75, 0], 10, short_seconds=60)
  wait_for_run(tmp_path, 1)
  launcher.stderr.readline()
  launcher.send_signal(signal.SIGTERM)
  launcher.communicate(timeout=10)
  assert launcher.returncode == 75
  assert num_runs(tmp_path) == 1


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    launcher = start(tmp_path, ["wait"], 0)
  finally:
    signal.signal(signal.SIGHUP, before)
  wait_for_run(tmp_path, 1)
  launcher.send_signal(signal.SIGHUP)
  time.sleep(0.5)
  assert launcher.poll() is None
  os.kill(launcher.pid, signal.SIGTERM)
  launcher.communicate(timeout=10)
