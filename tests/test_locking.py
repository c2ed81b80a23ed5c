"""A workdir is of one run at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.locking import workdir_lock

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from ultrathink_jax.locking import workdir_lock
with workdir_lock(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def holder(workdir):
  """Returns another process that holds the lock."""
  process = subprocess.Popen([sys.executable, "-c", HOLDER, workdir], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  return process


def test_a_second_run_is_refused_and_told_who_holds_the_workdir(tmp_path):
  process = holder(tmp_path / "run")
  try:
    with pytest.raises(ConfigError) as refusal, workdir_lock(tmp_path / "run"):
      pass
    assert refusal.value.exit_code == 2
    assert f"--workdir={tmp_path / 'run'} is in use by process {process.pid} on {os.uname().nodename}" in str(
      refusal.value
    )
  finally:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_goes_with_its_process_however_that_ends(tmp_path, number):
  process = holder(tmp_path)
  process.send_signal(number)
  process.communicate()
  with workdir_lock(tmp_path):
    pass


def test_a_lock_is_free_again_after_its_body_and_after_an_error(tmp_path):
  with workdir_lock(tmp_path):
    pass
  with pytest.raises(RuntimeError), workdir_lock(tmp_path):
    raise RuntimeError
  with workdir_lock(tmp_path), workdir_lock(tmp_path / "another"):
    pass


def test_a_lock_file_that_somebody_wrote_nonsense_into_does_no_harm(tmp_path):
  (tmp_path / "lock").write_bytes(b"\xff{nonsense")
  process = holder(tmp_path)
  (tmp_path / "lock").write_bytes(b"\xff{nonsense")
  with pytest.raises(ConfigError, match="in use by another process"), workdir_lock(tmp_path):
    pass
  process.kill()
  process.communicate()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot be written"), workdir_lock(tmp_path / "file"):
    pass
