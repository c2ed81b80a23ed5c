"""Runs the trials of a sweep, each a program and a directory of its own, and goes on where an earlier session ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.api import DATA_DIRECTORY
from ultrathink_jax.config import Config
from ultrathink_jax.data.prepare import prepare
from ultrathink_jax.data.storage import lock
from ultrathink_jax.errors import INTERRUPTED_EXIT_CODE, ConfigError, Preempted
from ultrathink_jax.interruption import LAUNCHER, Interruption
from ultrathink_jax.locking import workdir_lock
from ultrathink_jax.sweep.leaderboard import Outcome, format_leaderboard, read_value, write
from ultrathink_jax.sweep.trials import Request, Trial, make_trials, value_of
from ultrathink_jax.workdir import claim, read_json

_DATA_KEYS = ("data.", "quality.", "code.", "model.vocab_size")  # keys that decide what prepared data are
_STOPPED = (Preempted.exit_code, INTERRUPTED_EXIT_CODE)  # exit codes of a trial that the same command goes on with
_PROGRAM = (sys.executable, "-m", "ultrathink_jax.main")
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0  # that a sweep has to end longer than its trials


class _Running(NamedTuple):
  index: int
  process: subprocess.Popen
  begun: float


def sweep(
  request: Request,
  config: Config,
  workdir: Path,
  flags: list[str],
  make_config: Callable[[list[str]], Config],
  interruption: Interruption,
  log: Callable[[str], None],
) -> int:
  """Runs every trial that has not finished yet and returns the exit code: 0 if any has finished by then.

  Trials live in workdir/trials/NAME. A trial that fails is recorded and does not end the sweep. `flags` are those that
  every trial gets, --config among them; `make_config` takes the flags of a trial beside them. When this process is
  killed its trials are told to stop.

  Raises:
    ConfigError: an axis or the configuration of a trial is wrong, or `workdir` is in use or holds another sweep.
    Preempted: a signal ended the sweep, after its trials were told and ended.
  """
  trials = make_trials(request, config, make_config)
  with workdir_lock(workdir):
    claim(workdir, config, log)
    return _Sweep(request, config, workdir, flags, trials, interruption, log).run()


class _Sweep:
  """The trials of a sweep and what has come of them so far."""

  def __init__(
    self,
    request: Request,
    config: Config,
    workdir: Path,
    flags: list[str],
    trials: list[Trial],
    interruption: Interruption,
    log: Callable[[str], None],
  ):
    self._request, self._config, self._workdir, self._flags = request, config, workdir, flags
    self._trials, self._interruption, self._log = trials, interruption, log
    before = {row["name"]: row for row in read_json(workdir / "sweep.json").get("trials", [])}
    self._outcomes = [Outcome(seconds=before.get(trial.name, {}).get("seconds", 0.0)) for trial in trials]

  def run(self) -> int:
    waiting = [index for index in range(len(self._trials)) if not self._is_finished(index)]
    done = len(self._trials) - len(waiting)
    self._log(f"[sweep] {len(self._trials)} trials in {self._workdir / 'trials'}" + f", {done} finished" * bool(done))
    self._write()
    is_shared = not any(key.startswith(_DATA_KEYS) for key in self._trials[0].values)
    if waiting and is_shared:
      data, model = self._config.data, self._config.model
      prepare(data, model.vocab_size, self._shared_data, self._log, self._config.quality, self._config.code)
    self._interruption.stop_seconds = self._config.checkpoint.stop_seconds + _GRACE_SECONDS
    with self._interruption.phase("sweep", "finish"):
      self._run_all(waiting, is_shared)
      self._log(format_leaderboard(self._trials, self._outcomes, self._config.evaluate))
      self._log(f"[sweep] {self._workdir / 'sweep.md'}")
      states = [outcome.state for outcome in self._outcomes]
      if "stopped" in states:
        raise Preempted(
          f"{states.count('finished')} of {len(states)} trials have finished: the same command goes on with the others"
        )
    return 0 if "finished" in states else abs(self._outcomes[0].exit_code)

  @property
  def _shared_data(self) -> Path:
    return self._workdir / DATA_DIRECTORY

  def _directory(self, index: int) -> Path:
    return self._workdir / "trials" / self._trials[index].name

  def _run_all(self, waiting: list[int], is_shared: bool) -> None:
    running: list[_Running] = []
    is_stopping = is_told = False
    while running or (waiting and not is_stopping):
      is_stopping |= self._interruption.requested() is not None
      if is_stopping and not is_told:
        is_told = True
        for each in running:
          each.process.terminate()
      while waiting and not is_stopping and len(running) < self._request.num_parallel:
        running.append(self._start(waiting.pop(0), is_shared))
      time.sleep(_POLL_SECONDS)
      for each in [each for each in running if each.process.poll() is not None]:
        running.remove(each)
        is_stopping |= self._finish(each, is_told)
    for index in waiting:
      self._outcomes[index] = self._outcomes[index]._replace(state="stopped")
    self._write()

  def _start(self, index: int, is_shared: bool) -> _Running:
    trial, directory = self._trials[index], self._directory(index)
    directory.mkdir(parents=True, exist_ok=True)
    if is_shared:
      share(self._shared_data, directory / DATA_DIRECTORY, self._log)
    own = [f"--config.{key}={value}" for key, value in trial.values.items()]
    command = [*_PROGRAM, *self._flags, *own, f"--workdir={directory}"]
    with (directory / "console.log").open("a") as console:
      process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=subprocess.STDOUT,
        env=os.environ | {LAUNCHER: str(os.getpid())},  # it stops when the sweep is gone
        start_new_session=True,  # signals reach it through the sweep only
      )
    self._outcomes[index] = self._outcomes[index]._replace(state="running")
    self._write()
    self._log(f"[sweep] {index + 1}/{len(self._trials)} {trial.name} begins")
    return _Running(index, process, time.monotonic())

  def _finish(self, each: _Running, is_told: bool) -> bool:
    """Records what a trial came to and returns whether it was stopped."""
    code, directory = each.process.returncode, self._directory(each.index)
    seconds = self._outcomes[each.index].seconds + time.monotonic() - each.begun
    outcome = Outcome("failed", code, "", None, seconds)
    if code == 0:
      outcome = outcome._replace(state="finished", value=read_value(directory, self._config.evaluate))
    elif is_told or code in _STOPPED:
      outcome = outcome._replace(state="stopped")
    else:
      outcome = outcome._replace(line=_last_words(directory / "console.log", code))
    self._outcomes[each.index] = outcome
    self._write()
    trial = self._trials[each.index]
    said = {"failed": f"exit {code}: {outcome.line}", "stopped": "stopped"}.get(
      outcome.state, f"{self._config.evaluate.best_metric}={outcome.value}"
    )
    self._log(f"[sweep] {each.index + 1}/{len(self._trials)} {trial.name}: {said}")
    return outcome.state == "stopped"

  def _is_finished(self, index: int) -> bool:
    """Returns whether an earlier session finished the trial, with the same values; then its outcome is known."""
    directory, trial = self._directory(index), self._trials[index]
    written = read_json(directory / "config.json")
    if "result" not in read_json(directory / "run.json"):
      return False
    if any(_at(written, key) != json.loads(json.dumps(value_of(trial.config, key))) for key in trial.values):
      raise ConfigError(f"{directory} holds a trial of other values; choose another --workdir")
    value = read_value(directory, self._config.evaluate)
    self._outcomes[index] = self._outcomes[index]._replace(state="finished", exit_code=0, value=value)
    return True

  def _write(self) -> None:
    write(self._workdir, self._request, self._config.evaluate, self._trials, self._outcomes)


def share(source: Path, target: Path, log: Callable[[str], None]) -> None:
  """Gives a trial the prepared data of the sweep, without another copy where the file system can link.

  What `prepare` overwrites in place, the files at the top, is copied; everything below it replaces as a whole.
  """
  if target.exists():
    return
  incomplete = target.with_name(target.name + ".incomplete")
  shutil.rmtree(incomplete, ignore_errors=True)

  def put(file: str, place: str) -> None:
    if Path(file).parent == source:
      shutil.copy2(file, place)
      return
    try:
      os.link(file, place)
    except OSError:  # another file system, or one without links
      shutil.copy2(file, place)

  with lock(source, log):
    shutil.copytree(source, incomplete, copy_function=put)
  incomplete.rename(target)


def _last_words(console: Path, code: int) -> str:
  """Returns the line in which a trial said why it failed."""
  if code < 0:
    return f"ended by {signal.Signals(-code).name}"
  lines = [line for line in console.read_text(errors="replace").splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("error: ")]
  return (errors or lines or [""])[-1].strip()


def _at(values: Any, key: str) -> Any:
  for part in key.split("."):
    values = values.get(part) if isinstance(values, dict) else None
  return values
