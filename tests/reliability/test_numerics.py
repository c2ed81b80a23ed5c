"""NaNs and spikes: what is not finite never reaches the parameters, counts are exact, and a run goes back once."""

import jax
import numpy as np
import pytest

from tests.reliability import runs
from ultrathink_jax import api
from ultrathink_jax.testing.faults import from_environment

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.reliability, pytest.mark.slow]
STEPS = 300


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return runs.make_config(tmp_path_factory.mktemp("text"), STEPS)


def test_nans_and_spikes_by_chance_are_skipped_and_counted(config, tmp_path):
  faults = "nan:0.03,spike:0.02"
  guard = "--config.optimizer.guard"
  output = runs.run(config, tmp_path / "run", f"{guard}.spike_sigmas=50", f"{guard}.window_steps=32", faults=faults)
  expected = from_environment(0, tmp_path, {"ULTRATHINK_FAULTS": faults})
  nans, spikes = (expected.steps(kind, STEPS) for kind in ("nan", "spike"))
  assert min(len(nans), len(spikes)) >= 3
  assert min(spikes) > 16, "the window must be half full"
  hit = sorted({*nans, *spikes})
  skipped = {row["step"]: row["skipped_steps"] for row in runs.rows(tmp_path / "run")}
  assert [step for step in range(1, STEPS + 1) if skipped[step] > skipped.get(step - 1, 0)] == hit
  assert output.count("does not count") == len(hit)
  losses = [row["loss"] for row in runs.rows(tmp_path / "run") if row["step"] not in hit]
  assert losses[-1] < losses[0] - 1
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(api.load(tmp_path / "run").params))


def test_bad_data_are_gone_around(config, tmp_path):
  output = runs.run(config, tmp_path / "run", faults="nan_data@103-114")
  assert output.count("[rollback]") == 1
  assert "back to step 100" in output
  assert runs.rows(tmp_path / "run")[-1]["step"] == STEPS
  again = runs.run(
    config, tmp_path / "again", faults="nan_data@103-114,kill@180", launcher=["--processes=1", "--max_restarts=1"]
  )
  assert "[resume] from step" in again
  assert runs.curve(tmp_path / "again") == runs.curve(tmp_path / "run")


def test_what_going_back_does_not_mend_ends_the_run_and_names_step_samples_and_parts(config, tmp_path):
  program = runs.start(config, tmp_path / "run", faults="nan@103-400")
  output, error = program.communicate(timeout=250)
  assert program.returncode == 5
  assert output.count("[rollback]") == 1
  line = error.splitlines()[-1]
  for words in ("error: loss or gradient of 10 steps in a row", "from step 103 on", "documents", "attention", "mamba"):
    assert words in line
  assert runs.saved_steps(tmp_path / "run")[-1] == 100
