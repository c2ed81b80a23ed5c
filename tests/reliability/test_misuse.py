"""Two trainers in one workdir, changed configurations, secrets, damage, full disks: by the command line."""

import os
import signal
import subprocess
import sys

import pytest

from tests.reliability import runs
from ultrathink_jax.testing import damage

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.reliability]
STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return runs.make_config(tmp_path_factory.mktemp("text"), STEPS)


def failure(config, workdir, *flags, **options):
  """Returns exit code, output and error of a run that does not end well."""
  program = runs.start(config, workdir, *flags, **options)
  output, error = program.communicate(timeout=200)
  assert program.returncode != 0, output
  return program.returncode, output, error


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_goes_on(config, tmp_path):
  first = runs.start(config, tmp_path / "run", faults="slow_data@5:20")
  runs.wait_until(first, lambda: len(runs.rows(tmp_path / "run")) >= 3)
  code, _, error = failure(config, tmp_path / "run")
  assert code == 2
  assert f"is in use by process {first.pid} on" in error
  first.send_signal(signal.SIGTERM)
  first.communicate(timeout=30)
  assert first.returncode == 75


@pytest.mark.slow
def test_a_changed_configuration_is_shown_and_needs_force(config, tmp_path):
  runs.run(config, tmp_path / "run", f"--config.train.steps={STEPS - 10}")
  change = "--config.optimizer.learning_rate=0.001"
  code, output, error = failure(config, tmp_path / "run", change)
  assert code == 2
  assert "[config] optimizer.learning_rate: 0.003 -> 0.001" in output
  assert f"[config] train.steps: {STEPS - 10} -> {STEPS}" in output
  assert "--force" in error
  output = runs.run(config, tmp_path / "run", change, "--force")
  assert f"[resume] from step {STEPS - 10} of {STEPS}" in output
  assert runs.rows(tmp_path / "run")[-1]["step"] == STEPS


@pytest.mark.slow
def test_damaged_checkpoints_are_gone_around_and_where_all_are_nothing_is_touched(config, tmp_path):
  workdir = tmp_path / "run"
  runs.run(config, workdir)
  whole = runs.curve(workdir)
  flip = damage.flip_bit(workdir / "checkpoints" / str(STEPS), 3)
  output = runs.run(config, workdir)
  assert f"[checkpoint] step {STEPS} is damaged: " in output
  assert flip.file.name in output
  assert f"[resume] from step {STEPS - 5} of {STEPS}" in output
  assert runs.curve(workdir) == whole
  assert (workdir / "damaged" / str(STEPS)).is_dir()
  for step in runs.saved_steps(workdir):
    damage.flip_bit(workdir / "checkpoints" / str(step), step)
  before = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*") if path.is_file()}
  code, _, error = failure(config, workdir)
  assert code == 4
  assert error.count("\n") == 1
  assert "--allow_fresh_start" in error
  assert {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*") if path.is_file()} == before
  output = runs.run(config, workdir, "--allow_fresh_start")
  assert "[resume]" not in output
  assert runs.curve(workdir) == whole


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing_and_one_that_stays_full_ends_the_run(config, tmp_path):
  whole = tmp_path / "whole"
  runs.run(config, whole)
  output = runs.run(config, tmp_path / "run", faults="disk_full@10-11,slow_disk@15:1")
  assert "[checkpoint] step 10 could not be saved" in output
  assert "No space left on device" in output
  assert runs.curve(tmp_path / "run") == runs.curve(whole)
  assert runs.saved_steps(tmp_path / "run")[-1] == STEPS
  code, _, error = failure(config, tmp_path / "full", faults=f"disk_full@8-{STEPS}")
  assert code == 4
  assert "No space left on device" in error
  assert runs.saved_steps(tmp_path / "full") == [5]


SECRETS = {
  "HF_TOKEN": "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7zC9bD1fG2h",
  "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
  "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzzzz",
  "MY_PASSWORD": "correct-horse-battery-7",
}


@pytest.mark.slow
def test_secrets_reach_neither_a_file_nor_the_console(config, tmp_path):
  workdir = tmp_path / "run"
  source = f"s3://user:{SECRETS['MY_PASSWORD']}@host/{SECRETS['HF_TOKEN']}"
  flags = [f"--config.log.run_name={SECRETS['AWS_SECRET_ACCESS_KEY']}", f"--config.log.project=sk-{'a1B2' * 12}"]
  with pytest.MonkeyPatch.context() as patch:
    for name, value in SECRETS.items():
      patch.setenv(name, value)
    said = runs.run(config, workdir, *flags, '--config.log.sinks=("mlflow",)')
    said += "".join(failure(config, tmp_path / "bad", f"--config.data.source=jsonl:{source}")[1:])
  secrets = [*SECRETS.values(), f"sk-{'a1B2' * 12}"]
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(files) > 20
  for secret in secrets:
    assert secret not in said
    for path in files:
      assert secret.encode() not in path.read_bytes(), path
      assert secret not in str(path), path
  assert "num_kv_heads" in (workdir / "config.json").read_text()
  assert os.environ.get("HF_TOKEN") != SECRETS["HF_TOKEN"]


OUT_OF_MEMORY = """
import sys
import jax
from ultrathink_jax import main
from ultrathink_jax.train import loop

compile_step, calls = loop.compile_step, []

def compile_or_fail(config, *rest):
  step = compile_step(config, *rest)
  calls.append(config.train.accumulation_steps)
  def failing(*arguments):
    if len(calls) <= int(sys.argv[1]) and int(arguments[0].step) == 12:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")
    return step(*arguments)
  return failing

loop.compile_step = compile_or_fail
main.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_device_without_memory_gets_smaller_micro_batches_once(config, tmp_path):
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

  def attempt(name, times):
    arguments = [str(times), f"--config={config}", f"--workdir={tmp_path / name}"]
    command = [sys.executable, "-c", OUT_OF_MEMORY, *arguments]
    return subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=250)

  result = attempt("once", 1)
  assert result.returncode == 0, result.stderr
  assert result.stdout.count("[memory] out of memory") == 1
  assert "train.accumulation_steps=2 and model.remat='full'" in result.stdout
  assert "[resume] from step 10" in result.stdout
  assert runs.rows(tmp_path / "once")[-1]["step"] == STEPS
  result = attempt("twice", 2)
  assert result.returncode == 2
  assert "error: out of memory" in result.stderr
  assert "try " in result.stderr
  assert runs.saved_steps(tmp_path / "twice")[-1] == 10
