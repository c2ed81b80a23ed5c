"""Checkpoints that are damaged on disk, whose save is killed, or that the disk has no room for."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.saving_loop import SIZE
from tests.train.saving import assert_same_bits, contents, like, save, settings, state_at
from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.testing.damage import apply, flip_bit, truncate, zero
from ultrathink_jax.train import digests
from ultrathink_jax.train.checkpoint import Checkpoints

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def directory(tmp_path):
  """Returns checkpoints of steps 1 and 2, with every kind of item."""
  directory = tmp_path / "checkpoints"
  with Checkpoints(directory, settings()) as checkpoints:
    save(checkpoints, 1, 2, value=1.0, averaged=state_at(5).params)
  return directory


def require_fall_back(directory, name):
  """Fails unless step 2 is found damaged, its file `name` said to be, and step 1 is taken and step 2 set aside."""
  said = []
  with Checkpoints(directory, settings(), said.append) as checkpoints:
    assert checkpoints.newest_intact() == 1, name
    assert checkpoints.steps() == [1]
  (line,) = said
  assert line.startswith(f"[checkpoint] step 2 is damaged: {name} ")
  assert line.endswith("; going back to step 1")
  (directory.parent / "damaged" / "2").rename(directory / "2")


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_each_flipped_bit_is_detected_and_the_step_before_taken(directory, flips):
  before = contents(directory)
  for seed in range(flips):
    flip = flip_bit(directory / "2", seed)
    require_fall_back(directory, str(flip.file.relative_to(directory / "2")))
    apply(flip)
  assert contents(directory) == before
  flip_bit(directory / "2", 0)
  with Checkpoints(directory, settings(), lambda line: None) as checkpoints:
    assert_same_bits(checkpoints.restore(checkpoints.newest_intact(), like(state_at(1)))[0], state_at(1))


def damages():
  """Returns what can happen to a file, by name."""
  return {
    "truncate": lambda path: truncate(path, 0),
    "zero": zero,
    "delete": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "lengthen": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "replace": lambda path: path.write_bytes(bytes(byte ^ 0x55 for byte in path.read_bytes())),
  }


@pytest.mark.parametrize("kind", damages())
def test_each_file_cut_zeroed_deleted_or_replaced_is_detected(directory, kind):
  files = sorted(path for path in (directory / "2").rglob("*") if path.is_file())
  names = {path.name for path in files}
  assert {"commit_success.txt", "_sharding", "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "metadata"} <= names
  assert digests.MANIFEST in names
  for path in files:
    data = path.read_bytes()
    damages()[kind](path)
    if not path.exists() or path.read_bytes() != data:
      require_fall_back(directory, str(path.relative_to(directory / "2")))
    path.write_bytes(data)


def test_a_file_that_does_not_belong_is_detected_in_each_folder(directory):
  for folder in [directory / "2", *(path for path in (directory / "2").rglob("*") if path.is_dir())]:
    (folder / "new").touch()
    require_fall_back(directory, str((folder / "new").relative_to(directory / "2")))
    (folder / "new").unlink()


def test_without_the_digests_flipped_bits_are_loaded_in_silence(tmp_path, monkeypatch):
  """The control: what the other tests find is not found by Orbax."""
  directory, state = tmp_path / "checkpoints", state_at(2, 4000)
  with Checkpoints(directory, settings()) as checkpoints:
    checkpoints.save(state, 2, {})
  largest = max((directory / "2" / "params").rglob("*"), key=lambda path: path.stat().st_size)
  monkeypatch.setattr(digests, "find_damage", lambda *args: None)
  wrong = 0
  for seed in range(5):
    flip = flip_bit(largest, seed)
    with Checkpoints(directory) as checkpoints:
      assert checkpoints.newest_intact() == 2
      embedding = checkpoints.restore_params(2, like(state.params))["embedding"]
    wrong += bool((embedding != state.params["embedding"]).any())
    apply(flip)
  assert wrong > 0


def test_where_every_checkpoint_is_damaged_nothing_on_disk_changes(directory):
  flips = [flip_bit(directory / step, 0) for step in ("1", "2")]
  before = contents(directory.parent)
  with Checkpoints(directory, settings()) as checkpoints, pytest.raises(CheckpointError) as error:
    checkpoints.newest_intact()
  assert error.value.exit_code == 4
  assert all(
    str(flip.file.relative_to(directory / step)) in str(error.value) for flip, step in zip(flips, "12", strict=True)
  )
  assert contents(directory.parent) == before


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_saving_loop_leaves_a_step_in_the_same_bits(tmp_path, kills):
  """Each is killed some part of a save after a few of them; step by step, so that slow machines get as far."""
  moments, newest = random.Random(0), 0
  for _ in range(kills):
    command = [sys.executable, "-m", "tests.reliability.saving_loop", str(tmp_path / "checkpoints")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(moments.randint(1, 5))]
    time.sleep(moments.uniform(0, 0.3))
    os.kill(process.pid, signal.SIGKILL)
    lines += process.communicate()[0].splitlines()
    committed = max([newest, *(int(line) for line in lines if line.strip())])
    with Checkpoints(tmp_path / "checkpoints", settings(keep_last=2)) as checkpoints:
      step = checkpoints.newest_intact() or 0
      assert step >= committed
      assert all(name.isdigit() for name in os.listdir(tmp_path / "checkpoints"))
      assert len(checkpoints.steps()) <= 3
      if step:
        assert_same_bits(checkpoints.restore(step, like(state_at(step, SIZE)))[0], state_at(step, SIZE))
      newest = step
  assert newest > 0
  assert not (tmp_path / "damaged").exists()


@pytest.fixture
def small_disk(tmp_path):
  """Returns a file system of 8 MiB."""
  path = tmp_path / "disk"
  path.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
  if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
    pytest.skip("mounting a small file system is not permitted")
  yield path
  subprocess.run(["umount", "--lazy", str(path)], check=True)


def saved(checkpoints, steps):
  """Returns which of the steps a loop saves."""
  made = []
  for step in steps:
    if checkpoints.due(step):
      checkpoints.save(state_at(step, 100_000), step, {})
      checkpoints._commit.join()
      made.append(step)
  return made


def test_a_full_disk_is_outlived_when_there_is_room_again_and_else_ends_the_run(small_disk):
  directory, said = small_disk / "run" / "checkpoints", []
  with Checkpoints(directory, settings(every_steps=4, keep_last=1), said.append) as checkpoints:
    assert saved(checkpoints, range(1, 7)) == [4]
    before = contents(directory)
    (small_disk / "filler").write_bytes(bytes(5_000_000))
    assert saved(checkpoints, range(7, 10)) == [8, 9]
    assert contents(directory) == before
    (small_disk / "filler").unlink()
    assert saved(checkpoints, range(10, 13)) == [10, 12]
  (small_disk / "filler").write_bytes(bytes(5_000_000))
  before = contents(directory)
  checkpoints = Checkpoints(directory, settings(every_steps=4, keep_last=1), said.append)
  assert checkpoints.newest_intact() == 12
  with pytest.raises(CheckpointError, match=r"No space left on device \(it needs up to 2.3 MiB, .* MiB are free"):
    saved(checkpoints, range(13, 30))
  assert contents(directory) == before
  assert len(said) == 5
  assert all("No space left on device" in line for line in said)


def test_a_disk_that_turns_read_only_is_outlived(small_disk):
  directory, said = small_disk / "run" / "checkpoints", []
  with Checkpoints(directory, settings(), said.append) as checkpoints:
    save(checkpoints, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert saved(checkpoints, [2]) == [2]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert saved(checkpoints, [3]) == [3]
    checkpoints.wait()
    assert checkpoints.newest_intact() == 3
  assert "Read-only file system" in said[0]


def test_a_slow_disk_does_not_hold_up_steps_between_saves(tmp_path, monkeypatch):
  seal = digests.seal
  monkeypatch.setattr(digests, "seal", lambda *args: (time.sleep(1), seal(*args)))
  with Checkpoints(tmp_path, settings(every_steps=5)) as checkpoints:
    save(checkpoints, 5)
    begun = time.monotonic()
    assert checkpoints.due(10)
    checkpoints.save(state_at(10), 10, {})
    assert not any(checkpoints.due(step) for step in range(11, 15))
    assert time.monotonic() - begun < 0.7
    assert checkpoints.steps() == [5]
    checkpoints.save(state_at(15), 15, {})
    assert checkpoints.steps() == [5, 10]
    assert time.monotonic() - begun > 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_saving_and_verifying_and_agree_on_what_happened(tmp_path, processes):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  environment = os.environ | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
  environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // processes), "XLA_FLAGS": ""}
  command = [sys.executable, "-m", "tests.reliability.saving_together", str(tmp_path / "checkpoints")]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
  started = [
    subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(index)}, **pipes) for index in range(processes)
  ]
  said = [process.communicate(timeout=200) for process in started]
  for index, (output, error) in enumerate(said):
    assert started[index].returncode == 0, error
    ours = ("save ", "steps ", "restored ", "[checkpoint]", "[init]")
    lines = [line for line in output.splitlines() if line.startswith(ours)]
    reason = "Input/output error" if index == processes - 1 else "could not write"
    assert reason in lines[2]
    assert "retry 1 of 3 at step 5" in lines[2]
    assert "step 8 is damaged: optimizer/" in lines[7]
    del lines[2], lines[6]
    end = [f"[init] 2 of 2 parameters from {tmp_path / 'checkpoints'} step 6", "restored 6"]
    assert lines == ["save 2", "save 4", "save 5", "save 6", "save 8", "steps [5, 6, 8] best 5", *end]
  assert os.listdir(tmp_path / "damaged") == ["8"]
