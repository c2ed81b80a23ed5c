"""MLflow and Weights & Biases, as threads of their own: a run neither waits for them nor fails with them."""

import contextlib
import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ultrathink_jax import logs
from ultrathink_jax.config import Config
from ultrathink_jax.config.watching import LogConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.redaction import redact
from ultrathink_jax.workdir import read_json, write_json

IDS_FILE = "sinks.json"  # which runs of the services this workdir is

_QUEUE_LENGTH = 10_000
_END_SECONDS = 60.0  # to send what is left, after a run that went well
_FAILURE_SECONDS = 3.0  # after one that did not
_ids_lock = threading.Lock()


class Record(NamedTuple):
  """The numbers of a step, by the names that services show."""

  step: int
  time: float
  scalars: dict[str, int | float]


class Start(NamedTuple):
  """What a service needs to begin a run or go on with it.

  Attributes:
    run_id: of the run to go on with; None for a new one.
    parameters: the configuration, nested and without secrets.
  """

  workdir: Path
  project: str
  run_name: str
  run_id: str | None
  parameters: dict[str, Any]


class Service(Protocol):
  """A connection; every call may take its time and may fail."""

  run_id: str

  def __init__(self, start: Start): ...

  def send(self, records: list[Record]) -> None: ...

  def finish(self, has_failed: bool) -> None: ...


class Mlflow:
  """A run of MLflow: where MLFLOW_TRACKING_URI says, else in files under WORKDIR/mlflow."""

  def __init__(self, start: Start):
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since 3.13 files must be asked for
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    self._metric = Metric
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (start.workdir / "mlflow").resolve().as_uri()
    self._client = MlflowClient(uri)
    if start.run_id is not None:
      self.run_id = start.run_id
      self._client.update_run(self.run_id, status="RUNNING")
      return
    experiment = self._client.get_experiment_by_name(start.project)
    number = self._client.create_experiment(start.project) if experiment is None else experiment.experiment_id
    self.run_id = self._client.create_run(number, run_name=start.run_name).info.run_id
    parameters = [Param(name, str(value)[:500]) for name, value in flatten(start.parameters).items()]
    for first in range(0, len(parameters), 100):  # as many as a request may hold
      self._client.log_batch(self.run_id, params=parameters[first : first + 100])

  def send(self, records: list[Record]) -> None:
    metrics = [
      self._metric(name, value, int(record.time * 1000), record.step)
      for record in records
      for name, value in record.scalars.items()
    ]
    for first in range(0, len(metrics), 1000):  # as many as a request may hold
      self._client.log_batch(self.run_id, metrics=metrics[first : first + 1000])

  def finish(self, has_failed: bool) -> None:
    self._client.set_terminated(self.run_id, "FAILED" if has_failed else "FINISHED")


class WeightsAndBiases:
  """A run of Weights & Biases, offline where WANDB_MODE=offline; its files are in WORKDIR/wandb.

  Nothing is sent but what is given here: neither command lines nor code, console or the state of the repository.
  """

  def __init__(self, start: Start):
    import wandb

    self._library = wandb
    wandb.setup(wandb.Settings(silent=True))  # so that it never asks for a key on the terminal
    self._run = wandb.init(
      project=start.project,
      name=start.run_name,
      id=start.run_id or secrets.token_hex(4),
      resume="allow",
      config=start.parameters,
      settings=wandb.Settings(
        root_dir=str(start.workdir),
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
      ),
    )
    self.run_id = self._run.id
    self._run.define_metric("*", step_metric="step")  # its own steps can never go back

  def send(self, records: list[Record]) -> None:
    for record in records:
      self._run.log({"step": record.step, **record.scalars})

  def finish(self, has_failed: bool) -> None:
    self._run.finish(exit_code=int(has_failed))
    self._library.teardown(int(has_failed))  # ends its process, which may still be writing


SERVICES: dict[str, type[Service]] = {"mlflow": Mlflow, "wandb": WeightsAndBiases}


def require_sinks(log: LogConfig) -> None:
  """Raises ConfigError where a package that `log.sinks` needs is not installed; imports none of them."""
  for name in log.sinks:
    if importlib.util.find_spec(name) is None:
      raise ConfigError(
        f"log.sinks={log.sinks!r} needs the package {name}, which is not installed; "
        f"run pip install 'ultrathink-jax[{name}]' or leave {name} out"
      )


def open_services(workdir: Path, config: Config) -> list["Background"]:
  """Returns the services of `log.sinks`, going on with the runs that this workdir had there."""
  return [Background(name, SERVICES[name], workdir, config) for name in dict.fromkeys(config.log.sinks)]


class Background:
  """A service in a thread: a call puts a record in a queue and returns.

  Where the service fails, or is slower than the run for so long that the queue is full, that is said once and it is
  off for the rest of the session.
  """

  def __init__(self, name: str, make: Callable[[Start], Service], workdir: Path, config: Config):
    self._name = name
    self._queue: queue.Queue[Record | None] = queue.Queue(_QUEUE_LENGTH)
    self._is_off = False
    self._has_failed = False
    self._thread = threading.Thread(target=self._work, args=(make, workdir, config), name=f"sink {name}", daemon=True)
    self._thread.start()

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    if self._is_off:
      return
    try:
      self._queue.put_nowait(Record(step, time.time(), {shown_name(name): value for name, value in scalars.items()}))
    except queue.Full:
      self._give_up(f"{_QUEUE_LENGTH} records wait for it")

  def close(self, has_failed: bool) -> None:
    """Waits until all is sent, for a minute at most, or for seconds where the run has failed."""
    if self._is_off:
      return
    self._has_failed = has_failed
    with contextlib.suppress(queue.Full):
      self._queue.put(None, timeout=_FAILURE_SECONDS)
    self._thread.join(_FAILURE_SECONDS if has_failed else _END_SECONDS)
    if self._thread.is_alive():
      self._give_up("it takes too long to end")

  def _work(self, make: Callable[[Start], Service], workdir: Path, config: Config) -> None:
    try:
      service = make(_start(self._name, workdir, config))
      _remember(self._name, workdir, service.run_id)
      while not self._is_off and (records := self._take()):
        service.send(records)
      service.finish(self._has_failed)
    except BaseException as error:  # libraries of others end with what they like, SystemExit too
      self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

  def _take(self) -> list[Record]:
    """Returns all records that wait, at least one; none at the end."""
    records: list[Record] = []
    while not (records and self._queue.empty()):
      record = self._queue.get()
      if record is None:
        if records:
          self._queue.put(None)  # for the next call
        break
      records.append(record)
    return records

  def _give_up(self, reason: str) -> None:
    if not self._is_off:
      self._is_off = True
      logs.warn(f"[log] {self._name} is off for the rest of this session: {reason}")


def _start(name: str, workdir: Path, config: Config) -> Start:
  return Start(
    workdir,
    redact(config.log.project),
    redact(config.log.run_name or workdir.resolve().name),
    read_json(workdir / IDS_FILE).get(name),
    redact(json.loads(config.to_json())),
  )


def _remember(name: str, workdir: Path, run_id: str) -> None:
  with _ids_lock:
    write_json(workdir / IDS_FILE, read_json(workdir / IDS_FILE) | {name: run_id})


def shown_name(name: str) -> str:
  """Returns the name of a metric in services: those in no group are in train/, so that no name is also a group's."""
  return name if "/" in name else f"train/{name}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested values by dotted names."""
  flat: dict[str, Any] = {}
  for name, value in values.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
  return flat
