"""When a program that makes no progress is noticed."""

import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultrathink_jax import watchdog
from ultrathink_jax.watchdog import Watchdog

ROOT = Path(__file__).parent.parent


@pytest.fixture
def barks(monkeypatch):
  """Returns a queue of what a watchdog says, and the watchdog, whose ticks are short."""
  monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.02)
  said = queue.Queue()
  with Watchdog(lambda what, seconds: said.put((what, seconds))) as dog:
    yield said, dog


def test_silence_beyond_the_limit_is_told_once_with_what_had_begun(barks):
  said, dog = barks
  dog.beat("step", 0.2)
  what, seconds = said.get(timeout=5)
  assert what == "step"
  assert 0.2 < seconds < 0.3
  time.sleep(0.5)
  assert said.empty()


def test_beats_and_phases_without_a_limit_are_no_silence(barks):
  said, dog = barks
  for _ in range(10):
    dog.beat("step", 0.3)
    time.sleep(0.05)
  dog.beat("compile", None)
  time.sleep(0.5)
  assert said.empty()


def test_a_process_that_was_suspended_has_not_been_silent():
  program = subprocess.Popen(
    [
      sys.executable,
      "-c",
      """
import time
from ultrathink_jax import watchdog
watchdog.TICK_SECONDS = 0.05
with watchdog.Watchdog(lambda what, seconds: print("bark", flush=True)) as dog:
  dog.beat("step", 1.0)
  print("ready", flush=True)
  time.sleep(0.6)  # of its own time, of which the watchdog counts at most as much again for the suspension
""",
    ],
    cwd=ROOT, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert program.stdout.readline() == "ready\n"
  program.send_signal(signal.SIGSTOP)
  time.sleep(3)
  program.send_signal(signal.SIGCONT)
  assert program.communicate(timeout=10)[0] == ""
