"""The record of a run survives kills and resumes, and its lines read as documented."""

import io
import json
import math
import re
import time
import types

import numpy as np
import pytest

from ultrathink_jax import logs
from ultrathink_jax.train.console import format_duration, format_evaluation, format_step
from ultrathink_jax.train.metrics import MetricsWriter

VALUES = {
  "loss": 3.2145,
  "learning_rate": 2.9e-4,
  "grad_norm": 0.83,
  "tokens": 983_040,
  "tokens_per_second": 8120.4,
  "step_seconds": 1.01,
}
MOE = {"moe/entropy": 0.97, "moe/max_expert": 0.18, "moe/dropped": 0.0, "moe/dead": 0, "moe/load": {"layer_1": [0.5]}}


@pytest.fixture(autouse=True)
def console():
  logs.configure(None, True)
  yield
  logs.close()


def read_events(path):
  from tensorboardX.proto import event_pb2

  data, events = path.read_bytes(), []
  while data:  # a TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)
    length = int.from_bytes(data[:8], "little")
    events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return events


def write_steps(workdir, resume_step, last_step):
  with MetricsWriter(workdir, resume_step, 10) as writer:
    for step in range(resume_step + 1, last_step + 1):
      writer.write(step, VALUES)
      writer.evaluation(step, {"evaluate/loss": 3.0, "evaluate/bits_per_byte": 1.1})


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_resume_keeps_earlier_bytes_and_drops_later_steps(tmp_path, name):
  write_steps(tmp_path, 0, 6)
  before = (tmp_path / name).read_bytes().splitlines(keepends=True)
  write_steps(tmp_path, 4, 4)
  assert (tmp_path / name).read_bytes() == b"".join(before[:4])


def test_resume_drops_a_torn_last_line(tmp_path):
  write_steps(tmp_path, 0, 3)
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole + b'{"step": 2, "loss": 3.')
  write_steps(tmp_path, 3, 4)
  assert path.read_bytes().startswith(whole)
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_going_back_leaves_the_bytes_of_steps_that_count(tmp_path, name):
  write_steps(tmp_path, 0, 6)
  before = (tmp_path / name).read_bytes().splitlines(keepends=True)
  with MetricsWriter(tmp_path, 6, 10) as writer:
    writer.write(7, VALUES)
    writer.evaluation(7, {"evaluate/loss": 3.0})
    writer.rewind(4)
    assert (tmp_path / name).read_bytes() == b"".join(before[:4])
    writer.write(5, VALUES)
    writer.evaluation(5, {"evaluate/loss": 3.0})
  assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_going_back_hides_tensorboard_events_from_then_on(tmp_path):
  from tensorboardX.proto import event_pb2

  with MetricsWriter(tmp_path, 0, 10) as writer:
    writer.write(6, VALUES)
    writer.rewind(4)
    writer.write(5, VALUES)
  (path,) = (tmp_path / "tensorboard").iterdir()
  assert [(e.session_log.status == event_pb2.SessionLog.START, e.step) for e in read_events(path)[1:]] == [
    *((True, 0), (False, 6), (True, 5), (False, 5))
  ]


def test_a_fresh_start_drops_everything(tmp_path):
  write_steps(tmp_path, 0, 3)
  write_steps(tmp_path, 0, 0)
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_step_is_on_disk_when_write_returns(tmp_path):
  with MetricsWriter(tmp_path, 0, 10) as writer:
    writer.write(1, VALUES)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, **VALUES}


def test_floats_read_back_to_the_same_bits(tmp_path):
  random = np.random.default_rng(0)
  doubles = random.standard_normal(50) * 10.0 ** random.integers(-300, 300, 50)
  singles = random.standard_normal(50).astype(np.float32)
  with MetricsWriter(tmp_path, 0, 10) as writer:
    writer.write(1, {**VALUES, "grad_norm": singles[0], "doubles": doubles, "singles": {"x": list(singles)}})
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert np.float32(line["grad_norm"]) == singles[0]
  assert np.array_equal(line["doubles"], doubles)
  assert np.array_equal(np.array(line["singles"]["x"], np.float32), singles)


def test_values_that_are_not_finite_are_written_as_null(tmp_path):
  with MetricsWriter(tmp_path, 0, 10) as writer:
    writer.write(1, {**VALUES, "loss": math.nan, "grad_norm": np.float32(np.inf)})
  line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
  assert line["loss"] is None
  assert line["grad_norm"] is None


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({}, "loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 grad=0.83"),
    (MOE, "loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 moe=[entropy=0.97 max=0.18 dropped=0.0%] grad=0.83"),
    (
      {**MOE, "moe/dead": 3, "moe/code/share": 0.875, "moe/code/entropy": 0.981, "moe/safety/share": 0.125},
      "loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 "
      "moe=[entropy=0.97 max=0.18 dropped=0.0% dead=3 code=88%/0.98 safety=12%] grad=0.83",
    ),
    (
      {**MOE, "dre/depth": 2.5, "dre/fast": 1 / 3},
      "loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 moe=[entropy=0.97 max=0.18 dropped=0.0%] "
      "dre=[depth=2.5 fast=0.333] grad=0.83",
    ),
    ({"grad_norm/mlp": 0.5}, "loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 grad=0.83"),
    (
      {"grad_norm/router": 0.0023, "skipped_steps": 2},
      "loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 grad=[total=0.83 router=2.3e-03] skipped=2",
    ),
    ({"loss": 8.3178, "grad_norm": 0.0}, "loss=8.3178 ppl=4,096 toks/s=8,120 lr=2.9e-04 grad=0.00"),
    ({"loss": 1e4, "grad_norm": 5e6}, "loss=10000.0000 ppl=inf toks/s=8,120 lr=2.9e-04 grad=5.0e+06"),
    ({"loss": math.nan, "grad_norm": math.nan}, "loss=nan ppl=nan toks/s=8,120 lr=2.9e-04 grad=nan"),
  ],
)
def test_step_line(changes, line):
  assert format_step(120, 2000, {**VALUES, **changes}) == f"[step] step=120/2000 {line}"


def test_evaluation_line():
  values = {"evaluate/loss": 3.2145, "evaluate/perplexity": 24.89}
  assert format_evaluation(200, values) == "[evaluate] step=200 loss=3.2145 ppl=24.9"
  values["evaluate/bits_per_byte"] = 1.2345
  assert format_evaluation(200, values) == "[evaluate] step=200 loss=3.2145 ppl=24.9 bits/byte=1.2345"


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45s"), (192, "3m12s"), (7500, "2h05m"), (273_600, "3d04h")])
def test_durations(seconds, text):
  assert format_duration(seconds) == text


def test_no_progress_bar_off_a_terminal(tmp_path, capsys):
  write_steps(tmp_path, 0, 2)
  output = capsys.readouterr()
  assert output.err == ""
  assert output.out.splitlines()[0] == format_step(1, 10, VALUES)


def test_a_terminal_shows_a_progress_bar(tmp_path, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr("sys.stderr", terminal)
  write_steps(tmp_path, 0, 2)
  assert "2/10, eta " in terminal.getvalue()


def test_eta_counts_the_steps_of_this_session_only(tmp_path, capsys, monkeypatch):
  clock = iter([1000.0, 1004.0])
  fake = types.SimpleNamespace(time=time.time, monotonic=lambda: next(clock))
  monkeypatch.setattr("ultrathink_jax.train.metrics.time", fake)
  with MetricsWriter(tmp_path, 50, 100) as writer:
    writer.write(52, VALUES)
    writer.write(54, VALUES)
  first, second = capsys.readouterr().out.splitlines()
  assert "eta" not in first
  assert second.endswith(" eta=1m32s")


def test_tensorboard_events_hold_every_scalar_and_hide_steps_made_again(tmp_path):
  from tensorboardX.proto import event_pb2

  with MetricsWriter(tmp_path, 5, 10) as writer:
    writer.write(6, {**VALUES, **MOE})
    writer.evaluation(6, {"evaluate/loss": 3.0})
  (path,) = (tmp_path / "tensorboard").iterdir()
  assert re.match(r"events\.out\.tfevents\.", path.name)
  _, start, step, evaluation = read_events(path)
  assert (start.session_log.status, start.step) == (event_pb2.SessionLog.START, 6)
  scalars = {value.tag: value.simple_value for value in step.summary.value}
  assert scalars == pytest.approx({key: value for key, value in (VALUES | MOE).items() if key != "moe/load"})
  assert [value.tag for value in evaluation.summary.value] == ["evaluate/loss"]


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
  write = io.FileIO.write

  class Full(io.FileIO):
    def write(self, data):
      return write(self, data[:10])

  with MetricsWriter(tmp_path, 0, 10) as writer:
    writer.write(1, VALUES)
    whole = writer._files["metrics.jsonl"]._file
    with Full(tmp_path / "metrics.jsonl", "ab") as full:
      writer._files["metrics.jsonl"]._file = full
      writer.write(2, VALUES)
      writer.write(3, VALUES)
    writer._files["metrics.jsonl"]._file = whole
    writer.write(4, VALUES)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 4]
  assert capsys.readouterr().err == "[log] metrics.jsonl misses steps from here on: No space left on device\n"
