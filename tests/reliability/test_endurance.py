"""Runs that nobody attends to: faults minute after minute under the launcher, and many steps on end."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.reliability import runs
from ultrathink_jax.train.goodput import read_account

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.endurance, pytest.mark.slow]
LARGER = [  # so that a step takes tens of milliseconds, and not its loop
  "--config.model.embed_dim=96",
  "--config.model.head_dim=48",
  "--config.model.mlp_dim=256",
  "--config.train.batch_size=16",
  "--config.train.sequence_length=128",
]
SECONDS = 600  # of the run that faults interrupt, about one a minute


@pytest.mark.timeout(2400)
def test_ten_minutes_with_a_fault_a_minute_end_in_the_run_that_had_none(tmp_path):
  probe = runs.make_config(tmp_path / "probe", 400)
  runs.run(probe, tmp_path / "probe_run", *LARGER, "--config.train.log_every_steps=50")
  steady = [row["step_seconds"] for row in runs.rows(tmp_path / "probe_run")][2:]
  steps = int(SECONDS / np.median(steady) / 50) * 50
  config = runs.make_config(tmp_path / "text", steps)
  every = max(1, steps // 120)
  quiet = [*LARGER, "--config.train.log_every_steps=20", f"--config.evaluate.every_steps={steps // 4}"]
  quiet.append(f"--config.checkpoint.every_steps={every}")
  kinds = ("kill", "sigterm", "nan", "flip", "kill", "disk_full", "sigusr1", "nan", "kill")
  # Between two saves, so that no commit is under way when the newest checkpoint is damaged.
  at = [(number + 1) * steps // 10 // every * every + every // 2 for number in range(len(kinds))]
  faults = ",".join(f"{kind}@{step}" for kind, step in zip(kinds, at, strict=True))
  faults += f",kill@{at[3] + 1}"  # right after the flipped bit, so that the damaged checkpoint is read
  begun = time.monotonic()
  launcher = ["--processes=1", "--max_restarts=20"]
  said = runs.run(config, tmp_path / "run", *quiet, faults=faults, launcher=launcher, seconds=2000)
  elapsed = time.monotonic() - begun
  assert "is damaged" in said
  assert said.count("[resume]") == 6
  account = read_account(tmp_path / "run")
  print(f"{elapsed:.0f} s, {steps} steps, goodput {account.share:.1%}, {account.share_beside_compiling:.1%} beside "
        f"compiling; lost: {account.lost}")  # fmt: skip
  nans = ",".join(f"nan@{step}" for kind, step in zip(kinds, at, strict=True) if kind == "nan")
  runs.run(config, tmp_path / "whole", *quiet, faults=nans, seconds=1500)
  assert runs.curve(tmp_path / "run") == runs.curve(tmp_path / "whole")
  assert account.share_beside_compiling >= 0.9


@pytest.mark.timeout(1800)
def test_many_steps_leave_no_memory_files_or_compilations_behind(tmp_path):
  config = runs.make_config(tmp_path / "text", 20_000)
  workdir = tmp_path / "run"
  flags = [
    "--config.evaluate.every_steps=50",
    "--config.checkpoint.every_steps=50",
    "--config.train.log_every_steps=10",
  ]
  flags += ["--config.checkpoint.keep_last=3", "--config.checkpoint.keep_every_steps=8000"]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_LOG_COMPILES", "1")
    program = runs.start(config, workdir, *flags)
  ending, samples = [], []
  reader = threading.Thread(target=lambda: ending.extend(program.communicate()))
  reader.start()
  while reader.is_alive():
    last = _last_step(workdir)
    if last >= 1000:
      with contextlib.suppress(OSError, StopIteration):  # it is ending
        samples.append((last, _resident_bytes(program.pid), len(os.listdir(f"/proc/{program.pid}/fd"))))
    time.sleep(0.2)
  assert program.returncode == 0, ending[1][-2000:]
  steps, resident, files = map(np.array, zip(*samples, strict=True))
  early, late = steps < 4000, (steps > 16_000) & (steps < 19_000)
  memory = [float(np.median(resident[part])) / 2**20 for part in (early, late)]
  open_files = [int(files[part].min()) for part in (early, late)]  # when no commit is under way
  print(f"early and late: {memory[0]:.0f} and {memory[1]:.0f} MiB, {open_files[0]} and {open_files[1]} open files")
  assert memory[1] <= 1.02 * memory[0]
  assert open_files[1] <= open_files[0] + 2
  assert runs.saved_steps(workdir) == [8000, 16_000, 19_900, 19_950, 20_000]
  assert len(runs.rows(workdir, "evaluations.jsonl")) == 400
  log = (workdir / "train.log").read_text()
  before, _, after = log.partition(" step=1000/20000 ")
  assert "Compiling" in before
  assert "Compiling" not in after.partition(" step=20000/20000 ")[0]


def _last_step(workdir: Path) -> int:
  """Returns the last step in metrics.jsonl without reading all of it."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return 0
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - 4096))
    lines = file.read().splitlines()
  try:
    return json.loads(lines[-1])["step"]
  except (ValueError, IndexError):
    return 0


def _resident_bytes(pid: int) -> int:
  fields = Path(f"/proc/{pid}/status").read_text().splitlines()
  return next(1024 * int(line.split()[1]) for line in fields if line.startswith("VmRSS"))
