"""Runs the program as several processes on this machine, as a pod would, and starts them again when one is lost.

    python launch/local.py --processes=N [--devices_per_process=K] [--max_restarts=M] -- --config=configs/nano.py ...

What stands after `--` goes to ultrathink_jax.main. Process 0 writes here as if it were alone; error lines of the others
come with their number, and why they end only where none before them says it. When one process ends badly, all end.
The exit code is the program's.

After the loss of a process (exit code 6 or a signal) or a preemption (75) all are started again, M times at most, after
a pause that grows while runs end within seconds. What another try would not mend (codes 1 to 5) ends it, and so does a
signal to this program, which it passes on: the run then saves and ends with 75. With --processes=1 it keeps a single
run alive unattended.

--devices_per_process: virtual CPU devices of each process, or GPUs where there are any.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_RESTARTABLE = (6, 75)
_LAST_WORDS = ("error: ", "interrupted: ", "stopped: ")  # how the line begins that says why a process ends
_GRACE_SECONDS = 5  # in which processes that lost a peer say so themselves
_SHORT_SECONDS = 20  # a run that ends sooner makes the pause before the next one longer
_MAX_PAUSE_SECONDS = 30
_PASSED_ON = {  # signals, and what the processes are sent
  signal.SIGINT: signal.SIGINT,
  signal.SIGTERM: signal.SIGTERM,
  signal.SIGUSR1: signal.SIGUSR1,
  signal.SIGHUP: signal.SIGTERM,  # the terminal is gone
}


def main() -> int:
  """Returns the exit code of the program."""
  options, arguments = _parse(sys.argv[1:])
  command = [sys.executable, "-m", "ultrathink_jax.main", *arguments]
  if options.dry_run:
    for index in range(options.processes):
      variables = _variables(index, options.processes, options.devices_per_process, "PORT")
      print(shlex.join([*(f"{name}={value}" for name, value in variables.items()), *command]))
    return 0
  signals = _Signals()
  restarts = num_short = 0
  while True:
    begun = time.monotonic()
    code = _Run(command, options.processes, options.devices_per_process, signals).wait()
    if signals.received or (code >= 0 and code not in _RESTARTABLE) or restarts == options.max_restarts:
      return code if code >= 0 else 128 - code
    restarts += 1
    num_short = num_short + 1 if time.monotonic() - begun < _SHORT_SECONDS else 0
    pause = min(_MAX_PAUSE_SECONDS, 2 ** (num_short - 1)) if num_short else 0
    why = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    after = f" in {pause} s" if pause else ""
    print(
      f"[launch] ended with {why}; restart {restarts} of {options.max_restarts}{after}", file=sys.stderr, flush=True
    )
    if signals.wait(pause):
      return code if code >= 0 else 128 - code


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, required=True, metavar="N")
  parser.add_argument("--devices_per_process", type=int, default=1, metavar="K")
  parser.add_argument("--max_restarts", type=int, default=0, metavar="M")
  parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
  at = argv.index("--") if "--" in argv else len(argv)
  options = parser.parse_args(argv[:at])
  for name, minimum in (("processes", 1), ("devices_per_process", 1), ("max_restarts", 0)):
    if getattr(options, name) < minimum:
      parser.error(f"--{name}={getattr(options, name)} is below {minimum}")
  if not argv[at + 1 :]:
    parser.error("nothing to run; write -- --config=configs/NAME.py --workdir=DIR after the options")
  return options, argv[at + 1 :]


def _variables(index: int, count: int, devices: int, port: int | str) -> dict[str, str]:
  """Returns the environment that makes a process one of several; without the first three it is alone."""
  variables = {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_LOCAL_DEVICE_IDS": ",".join(str(index * devices + i) for i in range(devices)),  # of GPUs
  }
  if count > 1:
    variables |= {
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
    }
  return variables


class _Signals:
  """Passes on the signals that this program receives; one that its parent has it ignore stays ignored."""

  def __init__(self):
    self.received: list[int] = []
    self._processes: list[subprocess.Popen] = []
    for number in _PASSED_ON:
      if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, self._pass_on)

  def pass_to(self, processes: list[subprocess.Popen]) -> None:
    """From now on, signals go to these processes, and so does one that came while they were started."""
    self._processes = processes
    if self.received:
      _send(processes, _PASSED_ON[self.received[-1]])

  def wait(self, seconds: float) -> bool:
    """Returns whether a signal came by now, or comes within some seconds."""
    end = time.monotonic() + seconds
    while not self.received and time.monotonic() < end:
      time.sleep(0.05)
    return bool(self.received)

  def _pass_on(self, number: int, frame: object) -> None:
    self.received.append(number)
    _send(self._processes, _PASSED_ON[number])


def _send(processes: list[subprocess.Popen], number: int) -> None:
  for process in processes:
    if process.poll() is None:
      process.send_signal(number)


class _Run:
  """Processes that begin together and end together."""

  def __init__(self, command: list[str], count: int, devices: int, signals: _Signals):
    self._last_words: dict[int, str] = {}
    port = _free_port()
    launcher = {"ULTRATHINK_LAUNCHER": str(os.getpid())}  # a process that knows it ends when this program is killed
    self._processes = [
      subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | launcher | _variables(index, count, devices, port),
        stdout=subprocess.DEVNULL if index else None,
        stderr=subprocess.PIPE if index else None,
        text=True,
        errors="replace",
        start_new_session=True,  # signals reach them through this program only
      )
      for index in range(count)
    ]
    self._readers = [threading.Thread(target=self._relay, args=(index,)) for index in range(1, count)]
    for reader in self._readers:
      reader.start()
    signals.pass_to(self._processes)

  def wait(self) -> int:
    """Returns the exit code of the run, negative for a signal, when every process has ended."""
    deadline = None
    while any(process.poll() is None for process in self._processes):
      time.sleep(0.1)
      if deadline is None and any(process.poll() for process in self._processes):
        deadline = time.monotonic() + _GRACE_SECONDS
      if deadline is not None and time.monotonic() > deadline:
        _send(self._processes, signal.SIGKILL)
    for reader in self._readers:
      reader.join()
    codes = [process.returncode for process in self._processes]
    for index, line in self._last_words.items():
      if codes[index] not in codes[:index]:  # else one before it has said why
        print(f"[{index}] {line}", file=sys.stderr, flush=True)
    said = [code for code in codes if code > 0]  # a process that was killed could not say why the run ended
    return said[0] if said else min(codes)

  def _relay(self, index: int) -> None:
    for line in self._processes[index].stderr:
      if line.startswith(_LAST_WORDS):
        self._last_words[index] = line.rstrip()
      elif line.strip():
        print(f"[{index}] {line.rstrip()}", file=sys.stderr, flush=True)


def _free_port() -> int:
  """Returns a port that is free together with the next one, where processes watch each other."""
  while True:
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.suppress(OSError, OverflowError):
      port = server.getsockname()[1]
      with socket.create_server(("127.0.0.1", port + 1)):
        return port


if __name__ == "__main__":
  sys.exit(main())
