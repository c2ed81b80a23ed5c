"""Faults happen at the steps that were ordered, and leave everything else as it is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.testing import faults
from ultrathink_jax.testing.faults import VARIABLE, from_environment
from ultrathink_jax.types import Batch, Context, LossInfo, Recipe, TrainState

ROOT = Path(__file__).parent.parent.parent
STATE = TrainState(*[None] * len(TrainState._fields))


def ordered(text, workdir=Path("/nowhere"), seed=0):
  return from_environment(seed, workdir, {VARIABLE: text})


def toy_loss(params, frozen, batch, step, key):
  total = jnp.sum(params * batch.weights)
  return total, LossInfo(jnp.float32(2), {"loss/total": total, "moe/dropped": jnp.float32(3)})


def batch():
  ones = np.ones((2, 3), np.int32)
  return Batch(ones, ones, np.ones((2, 3), np.float32), Context(ones, ones))


TOY = Recipe(None, None, toy_loss, lambda data, rows: lambda step, state: batch(), None)


def gradient(recipe, done):
  """Returns loss, gradient and metrics of the step after `done` steps."""
  compute = jax.jit(jax.value_and_grad(recipe.loss, has_aux=True))
  (total, info), found = compute(jnp.full((2, 3), 0.1), None, batch(), jnp.int32(done), jax.random.key(0))
  return float(total), np.asarray(found), info.metrics


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("nan", "write KIND@STEP"),
    ("nan@", "write KIND@STEP"),
    ("nan@x", "write KIND@STEP"),
    ("nan@1:", "write KIND@STEP"),
    ("nan:1e-3", "write KIND@STEP"),
    ("boom@3", "kinds of faults are nan, spike"),
    ("nan:1.5", "between 0 and 1"),
    ("nan:0", "between 0 and 1"),
    ("nan@0", "counted from 1"),
    ("kill@9-3", "the first is not behind the last"),
    ("kill@9:3", "only slow_data and slow_disk"),
    ("kill@3,,spike@4,what@5", "'what@5'"),
  ],
)
def test_what_cannot_be_understood_is_refused_in_one_line(text, words):
  with pytest.raises(ConfigError, match=words) as refusal:
    ordered(text)
  assert VARIABLE in str(refusal.value)
  assert "\n" not in str(refusal.value)


def test_without_faults_the_recipe_is_the_same_object_and_nothing_is_said(tmp_path, capsys):
  none = from_environment(0, tmp_path, {})
  assert none.wrap(TOY) is TOY
  none.before_step(3)
  with none.saving(3):
    pass
  assert capsys.readouterr().out == ""
  assert list(tmp_path.iterdir()) == []


def test_a_run_with_faults_says_so(capsys):
  ordered("nan@3,kill:0.1")
  assert capsys.readouterr().out.startswith("[faults] ULTRATHINK_FAULTS=nan@3,kill:0.1: this run is made to fail")


def test_losses_and_gradients_fail_at_the_ordered_steps_alone():
  failing = ordered("nan@3-4,spike@6").wrap(TOY)
  clean_loss, clean_gradient, clean = gradient(TOY, 0)
  for step in range(1, 9):
    loss, found, metrics = gradient(failing, step - 1)
    if step in (3, 4):
      assert np.isnan(loss)
      assert np.isnan(found).all()
      assert np.isnan(metrics["loss/total"])
    else:
      factor = np.float32(1e6 if step == 6 else 1)
      assert loss == np.float32(clean_loss) * factor
      np.testing.assert_array_equal(found, clean_gradient * factor)
      assert metrics["loss/total"] == clean["loss/total"] * factor
    assert metrics["moe/dropped"] == 3


def test_chance_is_a_function_of_seed_and_step_and_the_same_inside_the_program():
  some = ordered("nan:0.05,kill:0.05", seed=3)
  steps = some.steps("nan", 4000)
  assert 140 < len(steps) < 260
  assert some.steps("nan", 4000) == steps
  assert some.steps("kill", 4000) != steps
  assert ordered("nan:0.05", seed=4).steps("nan", 4000) != steps
  gaps = np.diff(steps)
  assert gaps.min() < 5
  assert gaps.max() > 50  # neither in turn nor all together
  (fault,) = ordered("nan:0.05", seed=3)._faults
  inside = jax.jit(lambda step: fault.happens(step, 3))(jnp.arange(4001, dtype=jnp.int32))
  assert np.flatnonzero(np.asarray(inside)).tolist() == steps


def test_bad_data_stays_with_its_batch_whichever_step_reads_it():
  source = ordered("nan_data@5-6").wrap(TOY).source(None, range(2))
  is_bad = [bool(np.isnan(source(number, STATE).weights).all()) for number in range(8)]
  assert [number + 1 for number in range(8) if is_bad[number]] == [5, 6]
  assert not np.isnan(source(7, STATE).weights).any()


def test_data_that_stall_come_later_and_are_the_same():
  source = ordered("slow_data@5:0.3").wrap(TOY).source(None, range(2))
  begun = time.monotonic()
  source(3, STATE)
  assert time.monotonic() - begun < 0.2
  np.testing.assert_array_equal(source(4, STATE).weights, batch().weights)
  assert time.monotonic() - begun > 0.3


RUN = """
import os, signal, sys
from pathlib import Path
from ultrathink_jax.testing.faults import from_environment
if len(sys.argv) > 2:
  signal.signal(signal.SIGUSR1, lambda *_: print("signal", flush=True))
faults = from_environment(0, Path(sys.argv[1]))
for done in range(8):
  faults.before_step(done)
  print(done + 1, flush=True)
"""


def run(workdir, text, *arguments):
  command = [sys.executable, "-c", RUN, workdir, *arguments]
  environment = os.environ | {VARIABLE: text}
  program = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
  return program.returncode, program.stdout.splitlines()[1:]


def test_a_process_is_killed_before_its_step_once_in_a_workdir(tmp_path):
  assert run(tmp_path, "kill@3-4") == (-signal.SIGKILL, ["1", "2"])
  assert run(tmp_path, "kill@3-4") == (-signal.SIGKILL, ["1", "2", "3"])
  assert run(tmp_path, "kill@3-4") == (0, [str(step) for step in range(1, 9)])


def test_a_signal_is_sent_once_and_only_to_the_process_that_was_ordered(tmp_path):
  assert run(tmp_path, "sigusr1@3,kill@4/1", "handle") == (0, ["1", "2", "signal", *"345678"])


def test_a_process_that_is_to_hang_does(tmp_path):
  hanging = ordered("hang@3", tmp_path)
  hanging.before_step(1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(faults.time, "sleep", lambda seconds: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
      hanging.before_step(2)
  hanging.before_step(2)  # once


def test_a_bit_of_the_newest_checkpoint_is_flipped(tmp_path):
  for step in ("9", "10"):
    (tmp_path / "checkpoints" / step).mkdir(parents=True)
    (tmp_path / "checkpoints" / step / "data").write_bytes(bytes(100))
  flipping = ordered("flip@12", tmp_path)
  flipping.before_step(11)
  assert (tmp_path / "checkpoints" / "9" / "data").read_bytes() == bytes(100)
  changed = (tmp_path / "checkpoints" / "10" / "data").read_bytes()
  assert sum(byte.bit_count() for byte in changed) == 1


def test_a_save_on_a_full_disk_fails_and_the_next_one_does_not(tmp_path):
  full = ordered("disk_full@4-5")
  with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    save = lambda name: checkpointer.save(tmp_path / name, args=ocp.args.StandardSave({"x": jnp.ones(3)}))
    for done in (4, 5):
      with full.saving(done), pytest.raises(OSError, match="No space left"):
        save("no")
    with full.saving(6):
      save("yes")
    checkpointer.wait_until_finished()
  assert (tmp_path / "yes").exists()
  assert not (tmp_path / "no").exists()


def test_a_save_on_a_slow_disk_takes_longer():
  slow = ordered("slow_disk@4:0.3")
  begun = time.monotonic()
  with slow.saving(3):
    pass
  assert time.monotonic() - begun < 0.2
  with slow.saving(4):
    pass
  assert time.monotonic() - begun > 0.3
