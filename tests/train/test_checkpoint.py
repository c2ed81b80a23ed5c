import asyncio
import errno
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.train.saving import assert_same_bits, contents, like, save, settings, state_at
from ultrathink_jax.errors import CheckpointError, NumericsError
from ultrathink_jax.testing.damage import flip_bit
from ultrathink_jax.train.checkpoint import Checkpoints
from ultrathink_jax.train.checkpoint_files import CheckpointFiles, kept_steps


@pytest.fixture
def directory(tmp_path):
  return tmp_path / "run" / "checkpoints"


def test_a_state_comes_back_in_the_same_bits_in_another_object(directory):
  state, position = state_at(3), {"seed": 1, "progress": {"best": 0.1, "best_step": None}}
  with Checkpoints(directory, settings()) as checkpoints:
    checkpoints.save(state, 3, position, value=0.1, averaged=state_at(4).params)
  with Checkpoints(directory) as checkpoints:
    assert checkpoints.newest_intact() == checkpoints.best_step() == 3
    restored, restored_position = checkpoints.restore(3, like(state))
    assert_same_bits(restored, state)
    assert restored_position == position
    assert_same_bits(checkpoints.restore_params(3, like(state.params)), state_at(4).params)
    assert_same_bits(checkpoints.restore_params(3, like(state.params), averaged=False), state.params)


def test_a_state_without_a_guard_takes_the_fresh_one(directory):
  state = state_at(3)
  with Checkpoints(directory, settings()) as checkpoints:
    checkpoints.save(state._replace(guard=()), 3, {})
    assert_same_bits(checkpoints.restore(3, like(state), state_at(9).guard)[0].guard, state_at(9).guard)
    zeros = jax.tree.map(jnp.zeros_like, state.guard)
    assert_same_bits(checkpoints.restore(3, like(state))[0].guard, zeros)


def test_nothing_is_there_before_the_first_save(directory):
  with Checkpoints(directory) as checkpoints:
    assert (checkpoints.steps(), checkpoints.newest_intact(), checkpoints.best_step()) == ([], None, None)
    with pytest.raises(CheckpointError, match="5 does not exist; there are steps: none"):
      checkpoints.restore(5, like(state_at(5)))
  assert not directory.exists()


def test_the_next_step_may_take_the_memory_of_a_state_that_is_being_saved(directory, monkeypatch):
  """Writing begins only when later steps have gone over the memory."""
  may_write = threading.Event()
  create = ocp.path.atomicity.AtomicRenameTemporaryPath.create

  async def create_late(self):
    await asyncio.to_thread(may_write.wait)
    return await create(self)

  monkeypatch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "create", create_late)
  spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  arrays = {str(i): jnp.arange(200_000, dtype=jnp.float32) + i for i in range(8)}
  expected = jax.tree.map(lambda x: np.array(x, copy=True), arrays)
  with Checkpoints(directory, settings()) as checkpoints:
    checkpoints.save(state_at(1)._replace(params=arrays), 1, {})
    for _ in range(3):
      arrays = jax.block_until_ready(spoil(arrays))
    assert not any(directory.rglob("_METADATA"))
    may_write.set()
    checkpoints.wait()
    assert_same_bits(checkpoints.restore_params(1, like(arrays)), jax.tree.map(jnp.asarray, expected))


STEPS = range(1, 25)


@pytest.mark.parametrize(
  ("keep_last", "keep_best", "every", "best_is"),
  [(1, 0, 0, "lowest"), (3, 0, 0, "lowest"), (2, 2, 0, "highest"), (2, 3, 5, "lowest"), (1, 1, 7, "highest")],
)
def test_the_last_the_best_and_the_multiples_stay(keep_last, keep_best, every, best_is):
  values = {step: None if step % 4 == 0 else float((step * 7) % 11) for step in STEPS}
  config = settings(keep_last=keep_last, keep_best=keep_best, keep_every_steps=every)
  kept = kept_steps(config, values, best_is)
  for step in STEPS:
    is_better = (lambda a, b: a < b) if best_is == "lowest" else (lambda a, b: a > b)
    rivals = [s for s, v in values.items() if v is not None and values[step] is not None and s != step]
    above = sum(is_better(values[s], values[step]) or (values[s] == values[step] and s < step) for s in rivals)
    is_best = values[step] is not None and above < keep_best
    is_multiple = every > 0 and step % every == 0
    assert (step in kept) == (step > STEPS[-1] - keep_last or is_best or is_multiple)


def test_what_stays_outlives_a_restart(directory):
  config = settings(keep_last=1, keep_best=1, keep_every_steps=4)
  for step, value in zip(range(1, 8), [5.0, 1.0, 4.0, 3.0, None, 1.0, 2.0], strict=True):
    with Checkpoints(directory, config) as checkpoints:
      save(checkpoints, step, value=value)
  with Checkpoints(directory) as checkpoints:
    assert checkpoints.steps() == [2, 4, 7]
    assert checkpoints.best_step() == 2
  with Checkpoints(directory, best_is="highest") as checkpoints:
    assert checkpoints.best_step() == 4


def test_it_is_time_to_save_every_so_many_steps(directory):
  with Checkpoints(directory, settings(every_steps=3)) as checkpoints:
    assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["params/layers/scale", "optimizer/0/embedding", "averaged/embedding"])
def test_what_is_not_finite_is_never_saved(directory, bad, where):
  state, averaged = state_at(2), state_at(3).params
  spoil = lambda path, x: x.at[-1].set(bad) if _keystr(path) == where else x
  trees = {"params": state.params, "optimizer": state.opt_state, "averaged": averaged}
  trees = jax.tree_util.tree_map_with_path(spoil, trees)
  state = state._replace(params=trees["params"], opt_state=trees["optimizer"])
  with Checkpoints(directory, settings()) as checkpoints:
    with pytest.raises(NumericsError, match=f"1 of .* arrays .* {where}"):
      checkpoints.save(state, 2, {}, averaged=trees["averaged"])
    with pytest.raises(NumericsError, match="best_metric"):
      checkpoints.save(state_at(2), 2, {}, value=bad)
    assert checkpoints.steps() == []


def _keystr(path):
  return jax.tree_util.keystr(path, simple=True, separator="/")


def test_a_step_that_is_there_is_written_again_only_with_another_position_or_value(directory):
  with Checkpoints(directory, settings()) as checkpoints:
    save(checkpoints, 1)
    written = (directory / "1").stat().st_ino
    save(checkpoints, 1)
    assert (directory / "1").stat().st_ino == written
    save(checkpoints, 1, value=2.0)
    assert (directory / "1").stat().st_ino != written
    checkpoints.save(state_at(1), 1, {"skipped": 3}, value=2.0)
    assert checkpoints.restore(1, like(state_at(1)))[1] == {"skipped": 3}
    assert os.listdir(directory) == ["1"]


def test_what_a_killed_save_left_is_removed_and_what_it_was_replacing_is_back(directory):
  with Checkpoints(directory, settings()) as checkpoints:
    save(checkpoints, 1, 2)
  for name in ("saving/3", "saving/replaced-2", "4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-77"):
    (directory / name).mkdir(parents=True)
  (directory / "1").rename(directory / "saving" / "replaced-1")
  before = contents(directory)
  with Checkpoints(directory) as checkpoints:
    assert checkpoints.newest_intact() == 2
  assert contents(directory) == before
  with Checkpoints(directory, settings()) as checkpoints:
    assert checkpoints.newest_intact() == 2
    assert sorted(os.listdir(directory)) == ["1", "2"]
    assert_same_bits(checkpoints.restore(1, like(state_at(1)))[0], state_at(1))


def test_damaged_checkpoints_are_named_and_set_aside_once_there_is_an_intact_one(directory):
  said = []
  with Checkpoints(directory, settings()) as checkpoints:
    save(checkpoints, 1, 2, 3)
  (directory / "3" / "params" / "_METADATA").unlink()
  flip = flip_bit(directory / "2" / "optimizer", 0)
  damaged = contents(directory)
  with Checkpoints(directory, log=said.append) as reader:
    assert reader.newest_intact() == 1
  assert contents(directory) == damaged
  with Checkpoints(directory, settings(), said.append) as checkpoints:
    assert checkpoints.newest_intact() == 1
    expected = [
      "[checkpoint] step 3 is damaged: params/_METADATA is missing; going back to step 1",
      f"[checkpoint] step 2 is damaged: {flip.file.relative_to(directory / '2')} differs from its digest; going back "
      "to step 1",
    ]
    assert said == 2 * expected
    assert checkpoints.steps() == [1]
    save(checkpoints, 2)
    assert checkpoints.newest_intact() == 2
    flip_bit(directory / "2", 1)
  with Checkpoints(directory, settings()) as checkpoints:
    assert checkpoints.newest_intact() == 1
  assert sorted(os.listdir(directory.parent / "damaged")) == ["2", "2-2", "3"]
  aside = contents(directory.parent / "damaged" / "2")
  assert aside == {name.removeprefix("2/"): data for name, data in damaged.items() if name.startswith("2/")}


def test_where_all_are_damaged_nothing_changes_until_a_fresh_start_is_wanted(directory):
  with Checkpoints(directory, settings()) as checkpoints:
    save(checkpoints, 1, 2)
  for step in ("1", "2"):
    flip_bit(directory / step, 3)
  before = contents(directory.parent)
  with Checkpoints(directory, settings()) as checkpoints:
    with pytest.raises(CheckpointError, match=r"step 2: .*; step 1: .*--allow_fresh_start") as error:
      checkpoints.newest_intact()
    assert error.value.exit_code == 4
    assert contents(directory.parent) == before
    checkpoints.set_aside_all()
    assert checkpoints.newest_intact() is None
  assert sorted(os.listdir(directory.parent / "damaged")) == ["1", "2"]


def test_a_damaged_best_one_gives_way_to_the_next_best(directory):
  said = []
  with Checkpoints(directory, settings(), said.append) as checkpoints:
    for step, value in {1: 2.0, 2: 1.0, 3: 3.0}.items():
      save(checkpoints, step, value=value)
  flip_bit(directory / "2", 0)
  with Checkpoints(directory, log=said.append) as checkpoints:
    assert checkpoints.best_step() == 1
    with pytest.raises(CheckpointError, match="2 is damaged"):
      checkpoints.restore_params(2, like(state_at(2).params))
  assert len(said) == 1


def test_a_checkpoint_of_another_model_or_a_newer_version_is_refused_in_one_line(directory):
  with Checkpoints(directory, settings()) as checkpoints:
    save(checkpoints, 1)
    with pytest.raises(
      CheckpointError, match=r"params/embedding has shape \[40, 3\] there and has shape \[41, 3\]"
    ) as error:
      checkpoints.restore(1, like(state_at(1, size=41)))
    assert "\n" not in str(error.value)
    checkpoints._files.record = lambda step: {"format": 3}
    with pytest.raises(CheckpointError, match="format 3, made by a newer version"):
      checkpoints.restore(1, like(state_at(1)))


class Disk:
  """Makes saves fail as long as `is_full`."""

  def __init__(self, monkeypatch):
    self.is_full = False
    save = ocp.AsyncCheckpointer.save

    def failing(*args, **kwargs):
      if self.is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[1]))
      return save(*args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", failing)


@pytest.fixture
def disk(monkeypatch):
  return Disk(monkeypatch)


def steps_saved(checkpoints, first, last):
  """Returns at which of the steps a loop saves."""
  saved = []
  for step in range(first, last + 1):
    if checkpoints.due(step):
      checkpoints.save(state_at(step), step, {})
      checkpoints._commit.join()
      saved.append(step)
  return saved


def test_training_goes_on_past_a_failed_save_and_makes_it_again(directory, disk):
  said = []
  with Checkpoints(directory, settings(every_steps=8), said.append) as checkpoints:
    assert steps_saved(checkpoints, 1, 9) == [8]
    disk.is_full = True
    assert steps_saved(checkpoints, 10, 18) == [16, 17]
    disk.is_full = False
    assert steps_saved(checkpoints, 19, 40) == [19, 24, 32, 40]
    checkpoints.wait()
    assert checkpoints.steps() == [24, 32, 40]
  assert len(said) == 2
  assert "step 16 could not be saved" in said[0]
  assert "No space left on device" in said[0]
  assert "retry 1 of 3 at step 17" in said[0]
  assert "retry 2 of 3 at step 19" in said[1]


def test_the_fourth_failure_in_a_row_ends_the_run_and_leaves_the_last_checkpoint(directory, disk):
  said = []
  with Checkpoints(directory, settings(every_steps=8), said.append) as checkpoints:
    steps_saved(checkpoints, 1, 8)
    checkpoints.wait()
    before = contents(directory)
    disk.is_full = True
    reason = r"step 21 could not be saved in .*No space left.* needs up to .* MiB, .* MiB are free\); make room there"
    with pytest.raises(CheckpointError, match=reason) as error:
      steps_saved(checkpoints, 9, 40)
    with pytest.raises(CheckpointError, match=reason):
      checkpoints.due(22)
    checkpoints._failures = 0
  assert error.value.exit_code == 4
  assert len(said) == 3
  assert contents(directory) == before


def leave_while_saving(directory, do):
  with Checkpoints(directory, settings()) as checkpoints:
    checkpoints.save(state_at(3), 3, {})
    do()


def test_a_last_save_that_fails_is_an_error(directory, disk):
  disk.is_full = True
  with Checkpoints(directory, settings()) as checkpoints:
    checkpoints.save(state_at(1), 1, {})
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
      checkpoints.wait()
    disk.is_full = False
    save(checkpoints, 2)
  disk.is_full = True
  with pytest.raises(CheckpointError, match="step 3 could not be saved"):
    leave_while_saving(directory, lambda: None)
  with pytest.raises(ZeroDivisionError):
    leave_while_saving(directory, lambda: 1 / 0)


def test_a_failure_in_the_background_is_collected_and_leaves_nothing_behind(directory):
  said = []
  with Checkpoints(directory, settings(every_steps=2), said.append) as checkpoints:
    save(checkpoints, 2)
    (directory / "saving").write_text("in the way")
    checkpoints.save(state_at(4), 4, {})
    checkpoints._commit.join()
    assert checkpoints.due(5)
    assert len(said) == 1
    (directory / "saving").unlink()
    save(checkpoints, 5)
    assert not checkpoints.due(7)
  assert sorted(os.listdir(directory)) == ["2", "5"]


def test_a_file_that_is_made_while_others_are_deleted_goes_too(tmp_path, monkeypatch):
  files, delete, made = CheckpointFiles(tmp_path, print), shutil.rmtree, []

  def delete_as_another_writes(directory, **options):
    delete(directory, **options)
    if not made:
      made.append(directory)
      (directory / "9").mkdir(parents=True)

  monkeypatch.setattr(shutil, "rmtree", delete_as_another_writes)
  files.try_staging()
  files.clear_staging()
  assert made == [files.staging]
  assert not files.staging.exists()
