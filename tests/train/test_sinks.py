"""Services get what the files get, from threads of their own, and a run outlives them."""

import importlib.util
import math
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import tiny_config
from ultrathink_jax import logs
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.train.metrics import open_writer
from ultrathink_jax.train.sinks import services
from ultrathink_jax.train.sinks.services import Background, require_sinks
from ultrathink_jax.workdir import read_json

VALUES = {
  "loss": 3.25,
  "learning_rate": 2.9e-4,
  "grad_norm": 0.83,
  "tokens": 983_040,
  "tokens_per_second": 8120.5,
  "grad_norm/router": 0.02,
  "moe/load": {"layers.1": [0.5, 0.5]},
}
SECRET = "a-planted-secret"


@pytest.fixture
def console(capsys):
  logs.configure(None, True)
  yield capsys
  logs.close()


def with_sinks(*names):
  return tiny_config(log={"sinks": names, "project": "project", "run_name": f"token={SECRET}1"})


def run(workdir, config, first, last):
  with open_writer(workdir, first, 10, config) as writer:
    for step in range(first + 1, last + 1):
      writer.write(step, {**VALUES, "loss": VALUES["loss"] / step})
    writer.evaluation(last, {"evaluate/loss": math.nan})


class Recorder:
  """A service that keeps what it gets, and may be made to wait or to fail."""

  def __init__(self, start, gate=None, error=None):
    self.start, self.gate, self.error = start, gate, error
    self.run_id, self.records, self.end = start.run_id or "new", [], None
    made.append(self)

  def send(self, records):
    if self.gate is not None:
      self.gate.wait()
    if self.error is not None:
      raise self.error
    self.records += records

  def finish(self, has_failed):
    self.end = has_failed


made = []


@pytest.fixture
def recorder(monkeypatch):
  made.clear()
  monkeypatch.setitem(services.SERVICES, "mlflow", Recorder)
  return made


def test_a_service_gets_every_scalar_of_every_step_in_order(tmp_path, recorder):
  run(tmp_path, with_sinks("mlflow"), 0, 3)
  scalars = {
    "train/learning_rate": 2.9e-4,
    "train/grad_norm": 0.83,
    "train/tokens": 983_040,
    "train/tokens_per_second": 8120.5,
    "grad_norm/router": 0.02,
  }
  expected = [{"train/loss": VALUES["loss"] / step, **scalars} for step in (1, 2, 3)]
  assert [record.scalars for record in recorder[0].records[:3]] == expected
  assert [record.step for record in recorder[0].records] == [1, 2, 3, 3]
  assert recorder[0].end is False


def test_a_resumed_run_goes_on_with_its_run_there(tmp_path, recorder):
  run(tmp_path, with_sinks("mlflow"), 0, 3)
  run(tmp_path, with_sinks("mlflow"), 3, 5)
  assert [service.start.run_id for service in recorder] == [None, "new"]


def test_a_run_that_fails_says_so_to_its_services(tmp_path, recorder):
  with pytest.raises(KeyError), open_writer(tmp_path, 0, 10, with_sinks("mlflow")):
    raise KeyError
  assert recorder[0].end is True


def test_services_are_told_no_secrets(tmp_path, recorder, monkeypatch):
  monkeypatch.setenv("SOME_API_KEY", SECRET)
  run(tmp_path, with_sinks("mlflow"), 0, 1)
  assert SECRET not in str(recorder[0].start)
  assert "<redacted>" in recorder[0].start.run_name


def test_a_service_that_hangs_costs_a_step_nothing(tmp_path, recorder):
  gate = threading.Event()
  sink = Background("mlflow", lambda start: Recorder(start, gate), tmp_path, with_sinks("mlflow"))
  begun = time.monotonic()
  for step in range(1000):
    sink.write(step, {"loss": 1.0})
  assert time.monotonic() - begun < 1
  gate.set()
  sink.close(False)
  assert [record.step for record in recorder[0].records] == list(range(1000))


def test_a_service_that_never_ends_is_left_behind(tmp_path, recorder, console, monkeypatch):
  monkeypatch.setattr(services, "_FAILURE_SECONDS", 0.1)
  gate = threading.Event()
  sink = Background("mlflow", lambda start: Recorder(start, gate), tmp_path, with_sinks("mlflow"))
  sink.write(1, {"loss": 1.0})
  sink.close(True)
  assert console.readouterr().err == "[log] mlflow is off for the rest of this session: it takes too long to end\n"
  gate.set()


def test_a_service_that_falls_behind_for_long_is_off(tmp_path, recorder, console, monkeypatch):
  monkeypatch.setattr(services, "_QUEUE_LENGTH", 4)
  gate = threading.Event()
  sink = Background("mlflow", lambda start: Recorder(start, gate), tmp_path, with_sinks("mlflow"))
  for step in range(20):
    sink.write(step, {"loss": 1.0})
  assert console.readouterr().err == "[log] mlflow is off for the rest of this session: 4 records wait for it\n"
  gate.set()
  sink.close(False)


@pytest.mark.parametrize("error", [OSError("no route\nto host"), SystemExit(3), ValueError(f"api_key={SECRET}")])
def test_a_service_that_fails_is_off_after_one_line_and_the_run_goes_on(
  tmp_path, recorder, console, monkeypatch, error
):
  monkeypatch.setitem(services.SERVICES, "mlflow", lambda start: Recorder(start, error=error))
  run(tmp_path, with_sinks("mlflow"), 0, 5)
  (line,) = console.readouterr().err.splitlines()
  assert line.startswith(f"[log] mlflow is off for the rest of this session: {type(error).__name__}: ")
  assert SECRET not in line
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_named_with_what_installs_it(name, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
  with pytest.raises(ConfigError, match=rf"needs the package {name}.*pip install 'ultrathink-jax\[{name}\]'"):
    require_sinks(with_sinks(name).log)


def test_without_sinks_nothing_is_missing(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
  require_sinks(tiny_config().log)


def test_mlflow_holds_the_curve_the_configuration_and_one_run_of_two_sessions(tmp_path, monkeypatch):
  pytest.importorskip("mlflow")
  monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  config = with_sinks("mlflow")
  run(tmp_path, config, 0, 3)
  run(tmp_path, config, 3, 5)
  from mlflow import MlflowClient

  client = MlflowClient((tmp_path / "mlflow").as_uri())
  (found,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
  assert found.info.run_id == read_json(tmp_path / "sinks.json")["mlflow"]
  assert found.info.status == "FINISHED"
  history = sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss"))
  assert history == [(step, VALUES["loss"] / step) for step in range(1, 6)]
  assert found.data.metrics["grad_norm/router"] == 0.02
  assert math.isnan(found.data.metrics["evaluate/loss"])
  assert found.data.params["train.batch_size"] == str(config.train.batch_size)
  assert found.data.params["model.rope.theta"] == "10000.0"
  assert SECRET not in "".join(path.read_text() for path in (tmp_path / "mlflow").rglob("*") if path.is_file())


def test_weights_and_biases_holds_two_sessions_as_one_run_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("PLANTED_TOKEN", SECRET)
  config = with_sinks("wandb")
  run(tmp_path, config, 0, 3)
  run(tmp_path, config, 3, 5)
  number = read_json(tmp_path / "sinks.json")["wandb"]
  directories = sorted((tmp_path / "wandb").glob("offline-run-*"))
  assert [number in path.name for path in directories] == [True, True]
  first, second = (b"".join(path.read_bytes() for path in directory.glob("*.wandb")) for directory in directories)
  assert b"tokens_per_second" in first
  assert b"evaluate/loss" in second
  files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
  assert not any(SECRET.encode() in path.read_bytes() for path in files)


def test_importing_the_writer_imports_no_service():
  program = "import ultrathink_jax.train.metrics, sys; sys.exit('wandb' in sys.modules or 'mlflow' in sys.modules)"
  subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
