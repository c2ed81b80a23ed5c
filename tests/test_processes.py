"""Runs of several real processes on this machine: equal losses, checkpoints on any mesh, and the loss of a process."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("processes")  # one process makes the shared run, and they do not crowd the machine
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "far", "away"]
STEPS = 12
TINY = """
from configs import base

def get_config():
  config = base.get_config()
  config.model.update(
    layers="(AF)x2", vocab_size=300, embed_dim=16, dtype="float32", remat="none", num_heads=2, num_kv_heads=2,
    head_dim=8, mlp_dim=24, mamba_head_dim=8)
  config.data.source = "text:" + TEXT
  config.optimizer.update(learning_rate=3e-3, warmup_steps=5)
  config.train.update(steps=STEPS, batch_size=8, sequence_length=32, log_every_steps=1)
  config.evaluate.update(every_steps=6, num_batches=2)
  config.checkpoint.update(every_steps=4, keep_last=4)
  config.generate.max_new_tokens = 2
  return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Returns the path of a tiny configuration over a folder of generated text."""
  folder = tmp_path_factory.mktemp("text")
  words = random.Random(0)
  for number in range(40):
    sentences = (" ".join(words.choices(WORDS, k=9)) for _ in range(30))
    (folder / f"{number}.txt").write_text(".\n".join(sentences))
  path = folder / "tiny.py"
  path.write_text(f"TEXT = {str(folder / '*.txt')!r}\nSTEPS = {STEPS}\n{TINY}")
  return path


def start(config, workdir, *flags, processes=1, devices=1, max_restarts=0):
  """Returns a launcher that has just been started."""
  options = [f"--processes={processes}", f"--devices_per_process={devices}", f"--max_restarts={max_restarts}"]
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
  return subprocess.Popen(
    [sys.executable, "launch/local.py", *options, "--", f"--config={config}", f"--workdir={workdir}", *flags],
    cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def run(*arguments, **options):
  """Returns the output of a run that ends well."""
  launcher = start(*arguments, **options)
  output, error = launcher.communicate(timeout=250)
  assert launcher.returncode == 0, error
  return output


def rows(workdir, name="metrics.jsonl"):
  path = workdir / name
  return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def losses(workdir):
  return {row["step"]: row["loss"] for row in rows(workdir)}


def wait_for(launcher, is_so):
  deadline = time.monotonic() + 200
  while not is_so():
    assert launcher.poll() is None, launcher.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.05)


def process_of(launcher, index):
  """Returns the system's number of process `index` of a launcher."""
  for path in Path("/proc").glob("[0-9]*"):
    try:
      is_child = f"\nPPid:\t{launcher.pid}\n" in (path / "status").read_text()
      if is_child and f"JAX_PROCESS_ID={index}" in (path / "environ").read_text().split("\0"):
        return int(path.name)
    except OSError:
      continue
  raise AssertionError(f"the launcher has no process {index}")


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
  """Returns the workdir of a run of one process with one device."""
  workdir = tmp_path_factory.mktemp("runs") / "alone"
  run(config, workdir)
  return workdir


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_make_the_run_of_one(config, alone, tmp_path, processes):
  workdir = tmp_path / "several"
  output = run(config, workdir, processes=processes)
  assert f"[setup] {processes} processes on 1 machine, told by environment" in output
  assert "[sample]" in output
  assert output.count("[step] step=1/") == 1
  assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
  for step, loss in losses(alone).items():
    assert losses(workdir)[step] == pytest.approx(loss, abs=1e-5)
  for mine, theirs in zip(rows(workdir, "evaluations.jsonl"), rows(alone, "evaluations.jsonl"), strict=True):
    assert mine["evaluate/loss"] == pytest.approx(theirs["evaluate/loss"], abs=1e-5)
  assert json.loads((workdir / "run.json").read_text())["processes"] == processes
  assert (workdir / "report.html").exists()


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_loss_of_a_process_ends_the_others_in_one_line(config, tmp_path, victim):
  launcher = start(config, tmp_path / "killed", "--config.train.steps=100000", processes=2)
  wait_for(launcher, lambda: len(rows(tmp_path / "killed")) >= 3)
  os.kill(process_of(launcher, victim), signal.SIGKILL)
  begun = time.monotonic()
  _, error = launcher.communicate(timeout=60)
  assert time.monotonic() - begun < 15
  assert launcher.returncode == 6
  (line,) = error.splitlines()
  assert f"peer {victim} of 2 (" in line
  assert "is gone" in line


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_ends_the_others_within_half_a_minute(config, tmp_path, victim):
  launcher = start(config, tmp_path / "stopped", "--config.train.steps=100000", processes=2)
  wait_for(launcher, lambda: len(rows(tmp_path / "stopped")) >= 3)
  os.kill(process_of(launcher, victim), signal.SIGSTOP)
  begun = time.monotonic()
  _, error = launcher.communicate(timeout=60)
  assert time.monotonic() - begun < 30
  assert launcher.returncode == 6
  (line,) = error.splitlines()
  assert f"peer {victim} of 2 (" in line
  assert "hangs" in line


@pytest.mark.slow
def test_a_run_that_loses_a_process_starts_again_and_ends_with_the_same_curve(config, alone, tmp_path):
  workdir = tmp_path / "restarted"
  launcher = start(config, workdir, processes=2, max_restarts=2)
  wait_for(launcher, lambda: (workdir / "checkpoints" / "4").exists())
  os.kill(process_of(launcher, 1), signal.SIGKILL)
  output, error = launcher.communicate(timeout=250)
  assert launcher.returncode == 0, error
  assert "[launch] ended with exit code 6; restart 1 of 2" in error
  assert "[resume] from step" in output
  assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
  for step, loss in losses(alone).items():
    assert losses(workdir)[step] == pytest.approx(loss, abs=1e-5)


def test_an_error_of_one_process_ends_all_with_its_exit_code_in_one_line(config, tmp_path):
  launcher = start(config, tmp_path / "wrong", "--config.train.batch_size=3", processes=2)
  _, error = launcher.communicate(timeout=200)
  assert launcher.returncode == 2
  (line,) = error.splitlines()
  assert "3 sequences" in line


def test_ctrl_c_stops_all_processes_after_the_same_step_from_which_they_go_on(config, alone, tmp_path):
  workdir = tmp_path / "interrupted"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ULTRATHINK_FAULTS", f"slow_data@1-{STEPS}:0.3")  # so that it is not done before
    launcher = start(config, workdir, processes=2)
  wait_for(launcher, lambda: len(rows(workdir)) >= 3)
  launcher.send_signal(signal.SIGINT)
  _, error = launcher.communicate(timeout=60)
  assert launcher.returncode == 75, error
  last = error.splitlines()[-1]
  assert last.startswith("stopped: SIGINT after step ")
  step = int(last.split()[4].strip(","))
  assert (workdir / "checkpoints" / str(step)).exists()
  assert f"[resume] from step {step} of" in run(config, workdir, processes=2)
  for step, loss in losses(alone).items():
    assert losses(workdir)[step] == pytest.approx(loss, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(config, tmp_path, victim):
  workdir = tmp_path / "signalled"
  launcher = start(config, workdir, "--config.train.steps=100000", processes=2)
  wait_for(launcher, lambda: len(rows(workdir)) >= 3)
  os.kill(process_of(launcher, victim), signal.SIGTERM)
  begun = time.monotonic()
  _, error = launcher.communicate(timeout=60)
  assert time.monotonic() - begun < 15
  assert launcher.returncode == 75, error
  assert error.splitlines()[-1].startswith("stopped: SIGTERM after step ")


SHAPES = [  # processes, devices of each, mesh
  (1, 1, {}),
  (2, 1, {"data": 2}),
  (2, 2, {"data": 1, "fsdp": 4}),
  (1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
  (4, 1, {"data": 2, "tensor": 2}),
  (2, 4, {"data": 2, "fsdp": 2, "context": 2}),
  (4, 2, {"data": 2, "fsdp": 2, "pipe": 2}),
  (1, 4, {"data": 1, "context": 2, "tensor": 2}),
  (2, 2, {"data": 2, "pipe": 2}),
  (4, 1, {"data": 1, "fsdp": 4}),
  (2, 1, {"data": 1, "tensor": 2}),
  (1, 2, {"data": 1, "fsdp": 2}),
  (1, 1, {}),
]


def make_leg(config, data, workdir, steps, processes, devices, mesh):
  """Runs tests/leg.py to step `steps` and returns what each of its processes says."""
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_NUM_CPU_DEVICES": str(devices)}
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
  started = []
  for index in range(processes):
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    variables |= {"JAX_PROCESS_ID": str(index)}
    command = [sys.executable, "-m", "tests.leg", str(config), str(data), str(workdir), str(steps), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started.append(subprocess.Popen(command, cwd=ROOT, env=environment | variables, **pipes))
  said = [process.communicate(timeout=500) for process in started]
  assert [process.returncode for process in started] == [0] * processes, said[0][1]
  return [json.loads(output.splitlines()[-1]) for output, _ in said]


def batches(said):
  """Returns {step: {row: digest}} of what all processes of a leg read."""
  whole = {}
  for process in said:
    for step, digests in process["read"].items():
      whole.setdefault(int(step), {}).update({int(row): digest for row, digest in digests.items()})
  return whole


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_checkpoint_resumes_on_any_number_of_processes_and_any_mesh(config, alone, tmp_path):
  """Twelve transitions, two steps before and after each."""
  total = 2 * len(SHAPES)
  (whole,) = make_leg(config, alone / "data", tmp_path / "whole", total, 1, 1, {})
  before = None
  for number, (processes, devices, mesh) in enumerate(SHAPES):
    steps = 2 * number + 2
    said = make_leg(config, alone / "data", tmp_path / "wandering", steps, processes, devices, mesh)
    if before is not None:
      assert said[0]["restored_params"] == before["trained_params"], mesh
      assert said[0]["restored_state"] == before["saved_state"], mesh
    before = said[0]
    read = batches(said)
    assert read.keys() == {steps - 2, steps - 1}
    for step, digests in read.items():
      assert digests == batches([whole])[step], mesh
  assert sorted(losses(tmp_path / "wandering")) == list(range(1, total + 1))
  for step, loss in losses(tmp_path / "whole").items():
    assert losses(tmp_path / "wandering")[step] == pytest.approx(loss, abs=1e-5), step
