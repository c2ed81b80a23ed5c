"""What signals do to a program in each phase: programs of a few lines are started and signalled."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
HEAD = """
import hashlib, sys, time
from ultrathink_jax.interruption import Interruption, Stopped

def ready():
  print("ready", flush=True)

def call_c():
  hashlib.pbkdf2_hmac("sha256", b"a", b"b", 100_000_000)
"""


def start(body, **options):
  """Returns a program that has said that it is ready."""
  program = subprocess.Popen(
    [sys.executable, "-c", HEAD + body], cwd=ROOT, text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
  )  # fmt: skip
  assert program.stdout.readline() == "ready\n", program.stderr.read()
  time.sleep(0.1)  # into what follows
  return program


def end(program, *numbers, pause=0.3):
  """Returns exit code, output, errors and the seconds from the last signal to the end."""
  for number in numbers[:-1]:
    program.send_signal(number)
    time.sleep(pause)
  begun = time.monotonic()
  program.send_signal(numbers[-1])
  output, error = program.communicate(timeout=20)
  return program.returncode, output, error, time.monotonic() - begun


@pytest.mark.parametrize("number", SIGNALS)
def test_where_there_is_nothing_to_save_a_signal_ends_even_a_call_into_c(number):
  program = start("""
with Interruption() as interruption, interruption.phase("compile", "leave"):
  ready()
  call_c()
""")
  code, output, error, seconds = end(program, number)
  assert (code, output) == (75, "")
  assert error == f"stopped: {number.name} in phase compile; the same command resumes from the last checkpoint\n"
  assert seconds < 2


def test_a_program_begins_in_a_phase_that_is_left():
  code, *_ = end(start("""
with Interruption():
  ready()
  call_c()
"""), signal.SIGTERM)  # fmt: skip
  assert code == 75


@pytest.mark.parametrize("number", SIGNALS)
def test_a_phase_that_may_be_broken_off_is_and_then_the_program_saves(number):
  program = start("""
with Interruption() as interruption, interruption.phase("train", "finish"):
  try:
    with interruption.phase("evaluate", "raise"):
      ready()
      time.sleep(30)
  except Stopped as stopped:
    with interruption.phase("save", "finish"):
      time.sleep(0.5)
      print("saved", flush=True)
    raise Stopped("saved step 3")
""")
  code, output, error, _ = end(program, number)
  assert (code, output) == (75, "saved\n")
  assert error.splitlines()[-1] == "stopped: saved step 3"
  assert f"[stop] {number.name} in phase" in error


def test_a_step_is_finished_and_the_program_asks():
  program = start("""
with Interruption() as interruption, interruption.phase("train", "finish"):
  ready()
  while not interruption.requested():
    with interruption.phase("step", "finish"):
      time.sleep(0.05)
  print(interruption.requested(), flush=True)
  time.sleep(0.5)
  raise SystemExit(7)
""")
  code, output, error, _ = end(program, signal.SIGUSR1)
  assert (code, output) == (7, "SIGUSR1\n")  # it ended by itself
  assert "[stop] SIGUSR1" in error


def test_what_takes_too_long_is_ended_whatever_the_main_thread_does():
  program = start("""
with Interruption(stop_seconds=1.0) as interruption, interruption.phase("save", "finish"):
  ready()
  call_c()
""")
  code, _, error, seconds = end(program, signal.SIGTERM)
  assert code == 75
  assert 0.9 < seconds < 3
  assert "nothing was saved within 1 s in phase save" in error.splitlines()[-1]


def test_the_limit_holds_after_the_program_has_begun_to_leave():
  program = start("""
class Preempted(Exception):
  pass

try:
  with Interruption(stop_seconds=1.0) as interruption:
    with interruption.phase("train", "finish"):
      ready()
      while not interruption.requested():
        time.sleep(0.05)
      raise Preempted
except Preempted:
  call_c()
""")
  code, *_, seconds = end(program, signal.SIGTERM)
  assert code == 75
  assert seconds < 3


@pytest.mark.parametrize(
  ("numbers", "expected"), [((15, 15), 143), ((2, 2), 130), ((10, 15), 143), ((15, 2), 130)], ids=str
)
def test_a_second_signal_ends_the_program_at_once(numbers, expected):
  program = start("""
with Interruption() as interruption, interruption.phase("save", "finish"):
  ready()
  call_c()
""")
  code, _, error, seconds = end(program, *numbers)
  assert code == expected
  assert seconds < 2
  assert "before all was saved" in error.splitlines()[-1]


def test_a_signal_that_is_sent_twice_at_once_is_one():
  program = start("""
with Interruption() as interruption, interruption.phase("train", "finish"):
  ready()
  while not interruption.requested():
    time.sleep(0.05)
  time.sleep(1)
  raise SystemExit(7)
""")
  assert end(program, signal.SIGTERM, signal.SIGTERM, pause=0.01)[0] == 7


def test_a_signal_that_came_before_is_answered_as_a_phase_begins_and_as_one_comes_back():
  asked = """
with Interruption() as interruption:
  with interruption.phase("step", "finish"):
    ready()
    while not interruption.requested():
      time.sleep(0.05)
    print("finished", flush=True)
    {}
  print("went on", flush=True)
"""
  assert end(start(asked.format("")), signal.SIGTERM)[:2] == (75, "finished\n")
  begun = 'interruption.phase("evaluate", "raise").__enter__(); print("went on", flush=True)'
  assert end(start(asked.format(begun)), signal.SIGTERM)[:2] == (75, "finished\n")


def test_one_of_several_processes_is_not_broken_off():
  program = start("""
with Interruption() as interruption:
  interruption.is_alone = False
  interruption.on_request = lambda name: print("told", name, flush=True)
  with interruption.phase("train", "finish"), interruption.phase("evaluate", "raise"):
    ready()
    time.sleep(1)
    print("evaluated", flush=True)
""")
  assert end(program, signal.SIGTERM)[:2] == (75, "told SIGTERM\nevaluated\n")  # the phase it began in comes back


def test_peers_are_told_before_the_process_ends():
  program = start("""
with Interruption() as interruption:
  interruption.tell = lambda code, line: print(code, line, flush=True)
  ready()
  time.sleep(30)
""")
  assert end(program, signal.SIGTERM)[1].startswith("75 SIGTERM; the same command resumes")


def test_a_program_whose_output_nobody_reads_ends_all_the_same():
  program = start("""
import threading
with Interruption() as interruption:
  ready()
  print("x" * 10_000_000, flush=True)
""")
  program.send_signal(signal.SIGTERM)
  assert program.wait(timeout=5) == 75
  program.communicate()


def test_signals_that_are_ignored_stay_ignored_and_others_get_their_handlers_back():
  program = start("""
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
before = signal.getsignal(signal.SIGTERM)
with Interruption() as interruption:
  ready()
  sys.stdin.readline()
print(interruption.requested(), signal.getsignal(signal.SIGTERM) == before, flush=True)
""")
  program.send_signal(signal.SIGINT)
  output, _ = program.communicate("\n", timeout=10)
  assert (program.returncode, output) == (0, "None True\n")


def is_running(pid):
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


WORKERS = """
import concurrent.futures, multiprocessing, os, sys, time
from ultrathink_jax.interruption import Interruption, end_with_parent

def work(number):
  os.write(1, f"worker {os.getpid()}\\n".encode())  # at once, and not between the parts of another's line
  time.sleep(2 if number < 2 else 60)

if __name__ == "__main__":
  with Interruption():
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(2, context, end_with_parent)
    [future.result() for future in [pool.submit(work, number) for number in range(4)]]
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("is_group", [False, True])
def test_workers_end_with_their_parent_and_say_nothing(tmp_path, number, is_group):
  path = tmp_path / "workers.py"
  path.write_text(WORKERS)
  program = subprocess.Popen(
    [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  workers = [int(program.stdout.readline().split()[1]) for _ in range(2)]
  assert all(map(is_running, workers))
  if is_group and number != signal.SIGKILL:
    os.killpg(program.pid, number)
  else:
    program.send_signal(number)
  program.wait(timeout=5)
  deadline = time.monotonic() + 5
  while any(map(is_running, workers)):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  _, error = program.communicate(timeout=5)
  assert program.returncode == (75 if number == signal.SIGINT else -9)
  assert "Traceback" not in error


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system cannot tell")
def test_a_program_whose_launcher_is_killed_stops():
  launcher = """
import os, subprocess, sys, time
os.environ["ULTRATHINK_LAUNCHER"] = str(os.getpid())
program = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(30)
"""
  body = (
    HEAD
    + """
with Interruption() as interruption, interruption.phase("train", "finish"):
  ready()
  while not interruption.requested():
    time.sleep(0.05)
  print("saved", flush=True)
"""
  )
  program = subprocess.Popen([sys.executable, "-c", launcher, body], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  with program:
    assert program.stdout.readline() == "ready\n"
    program.kill()
    assert program.stdout.read() == "saved\n"
