"""kill -9 at any time: the same command makes the run it would have been, to the bit; and the test can fail."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.reliability import runs
from ultrathink_jax import api

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.reliability, pytest.mark.slow]
STEPS = 240
MODELS = {"hybrid": "AFM", "experts": "AEME", "dense": "(AF)x2"}
# Each loses what a checkpoint must bring back, as a careless trainer would.
BROKEN = {
  "moments": "state = state._replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))",
  "schedule": "state = state._replace(step=state.step - 3)",
  "random numbers": "changes.seed = True",
  "data position": "position['progress']['data_offset'] += 1",
}
PROGRAM = """
import dataclasses, sys
import jax, jax.numpy as jnp
from ultrathink_jax import main
from ultrathink_jax.train import checkpoint, plan

class changes:
  seed = False

restore, make_train_step = checkpoint.Checkpoints.restore, plan.make_train_step

def broken_restore(self, *arguments, **options):
  state, position = restore(self, *arguments, **options)
  {damage}
  return state, position

def make_broken_step(config, *rest):
  if changes.seed:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=config.train.seed + 1))
  return make_train_step(config, *rest)

checkpoint.Checkpoints.restore, plan.make_train_step = broken_restore, make_broken_step
main.main(sys.argv)
"""


def numbers(workdir):
  """Returns all that the last checkpoint of a run holds of parameters, as one array of bytes."""
  leaves = jax.tree.leaves(api.load(workdir).params)
  return np.concatenate([np.asarray(leaf).view(np.uint8).ravel() for leaf in leaves])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return runs.make_config(tmp_path_factory.mktemp("text"), STEPS)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """Returns model -> the workdir of the run that nobody interrupts, with router noise where there are routers."""
  made = {}

  def run(name):
    if name not in made:
      made[name] = tmp_path_factory.mktemp("runs") / name
      runs.run(config, made[name], *flags(name))
    return made[name]

  return run


def flags(name):
  return [f"--config.model.layers={MODELS[name]}", "--config.model.router_noise=0.5"]


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("name", "kills", "every"), [("hybrid", 20, 5), ("experts", 6, 1), ("dense", 4, 1)])
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(config, whole, tmp_path, name, kills, every):
  reference = whole(name)
  chance = random.Random(11)
  workdir, options = tmp_path / "run", [*flags(name), f"--config.checkpoint.every_steps={every}"]
  lost = []
  for number in range(kills):
    program = runs.start(config, workdir, *options)
    if number % 2:  # in a step, an evaluation or a save; else wherever it may be
      logged = len(runs.rows(workdir))
      runs.wait_until(program, lambda logged=logged: len(runs.rows(workdir)) > logged)
      time.sleep(chance.uniform(0, 1))
    else:
      time.sleep(chance.uniform(1, 11))
    before = max([row["step"] for row in runs.rows(workdir)], default=0)
    program.kill()
    program.communicate()
    saved = runs.saved_steps(workdir)
    lost.append(before - max(saved, default=0))
    assert lost[-1] <= 2 * every + 1  # the save under way, and the one before it
  output = runs.run(config, workdir, *options)
  assert "[resume] from step" in output
  assert not list((workdir / "checkpoints").glob("*tmp*"))
  assert runs.curve(workdir) == runs.curve(reference)
  np.testing.assert_array_equal(numbers(workdir), numbers(reference))
  print(f"steps lost by each kill: {lost}")


@pytest.mark.parametrize("lost", BROKEN)
def test_a_resume_that_loses_something_is_noticed(config, whole, tmp_path, lost):
  reference = whole("experts")
  workdir = tmp_path / "run"
  program = runs.start(config, workdir, *flags("experts"))
  runs.wait_until(program, lambda: len(runs.rows(workdir)) >= 40)
  program.send_signal(signal.SIGTERM)
  program.communicate()
  arguments = [f"--config={config}", f"--workdir={workdir}", *flags("experts")]
  command = [sys.executable, "-c", PROGRAM.format(damage=BROKEN[lost]), *arguments]
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # as runs.start
  result = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=250)
  assert result.returncode == 0, result.stderr
  assert runs.curve(workdir) != runs.curve(reference)


def test_training_ends_early_with_the_best_parameters_however_often_it_is_stopped(config, tmp_path):
  options = ["--config.evaluate.patience=2", "--config.evaluate.min_delta=10", "--config.checkpoint.keep_best=1"]
  output = runs.run(config, tmp_path / "whole", *options)
  assert "[early] evaluate/loss was best at step 7, 2 evaluations ago" in output
  assert max(runs.curve(tmp_path / "whole")[0]) == 21
  assert api.load(tmp_path / "whole").step == 7
  stopped = runs.run(
    config, tmp_path / "stopped", *options, faults="kill@16", launcher=["--processes=1", "--max_restarts=1"]
  )
  assert "[resume] from step" in stopped
  assert runs.curve(tmp_path / "stopped") == runs.curve(tmp_path / "whole")
  np.testing.assert_array_equal(numbers(tmp_path / "stopped"), numbers(tmp_path / "whole"))
  again = runs.run(config, tmp_path / "whole", *options)
  assert "[step]" not in again


def test_a_run_begins_with_the_parameters_of_another(config, tmp_path):
  runs.run(config, tmp_path / "first", "--config.train.steps=30")
  flags = ["--config.train.steps=20", f"--config.checkpoint.init_from={tmp_path / 'first'}"]
  output = runs.run(config, tmp_path / "second", *flags)
  assert "[init]" in output
  last, first = (min(row["loss"] for row in runs.rows(tmp_path / name)[:2]) for name in ("second", "first"))
  assert last < first - 0.5


def test_a_run_of_so_many_tokens_or_epochs_has_the_steps_for_them(config, tmp_path):
  output = runs.run(config, tmp_path / "tokens", f"--config.train.tokens={12 * 4 * 32 - 5}")
  assert "[length] 12 steps of 4 x 32 tokens" in output
  assert runs.rows(tmp_path / "tokens")[-1]["step"] == 12
  output = runs.run(config, tmp_path / "epochs", "--config.train.epochs=0.5", "--config.train.sequence_length=256")
  assert "epochs (for train.epochs=0.5)" in output
