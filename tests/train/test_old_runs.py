"""Runs of earlier versions load and go on as they would have; see tests/fixtures/old_runs/README.md."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ultrathink_jax
from tests.conftest import tiny_config
from ultrathink_jax.config.older import from_saved
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent.parent
OLD_RUNS = ROOT / "tests" / "fixtures" / "old_runs"


@pytest.fixture
def v1(tmp_path):
  """Returns a copy of the run of version 1."""
  return Path(shutil.copytree(OLD_RUNS / "v1", tmp_path / "v1"))


def test_an_old_run_loads_with_the_same_logits(v1):
  model = ultrathink_jax.load(v1)
  assert model.step == 4
  logits = model.logits(np.array([[model.tokenizer.bos_id, 104, 101, 108]]))[0, -1, :8]
  np.testing.assert_allclose(logits, json.loads((v1 / "expected_logits.json").read_text()), rtol=1e-5, atol=1e-6)


def test_a_line_says_that_an_old_checkpoint_cannot_be_verified(v1):
  said = []
  with Checkpoints(v1 / "checkpoints", log=said.append) as checkpoints:
    assert checkpoints.newest_intact() == checkpoints.newest_intact() == 4
  assert said == ["[checkpoint] step 4 was made by an older version, without digests: it cannot be verified"]


def test_an_old_run_goes_on_with_the_losses_it_would_have_had(v1):
  command = [sys.executable, "-m", "ultrathink_jax.main", "--config=tests/fixtures/old_runs/v1/tiny.py"]
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
  run = subprocess.run([*command, f"--workdir={v1}"], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  rows = {row["step"]: row for row in map(json.loads, (v1 / "metrics.jsonl").read_text().splitlines())}
  assert sorted(rows) == [5, 6, 7, 8]
  for row in map(json.loads, (v1 / "expected_metrics.jsonl").read_text().splitlines()):
    if row["step"] in rows:
      for key in ("loss", "grad_norm", "learning_rate"):
        assert rows[row["step"]][key] == pytest.approx(row[key], rel=1e-5), key
  assert (v1 / "checkpoints" / "8" / "digests.txt").exists()


def test_an_old_configuration_has_the_defaults_of_keys_that_came_later():
  values = json.loads((OLD_RUNS / "v1" / "config.json").read_text())
  config = from_saved(values)
  assert config.model.layers == "A"
  assert config.optimizer.guard == tiny_config().optimizer.guard
  written = json.loads(config.to_json())
  assert all(written[section][key] == value for section in ("data", "train") for key, value in values[section].items())
  assert from_saved(written) == config


def test_a_key_that_is_not_known_is_refused():
  values = json.loads((OLD_RUNS / "v1" / "config.json").read_text())
  values["train"]["stepz"] = 3
  with pytest.raises(ConfigError, match=r"train\.stepz is not a configuration key"):
    from_saved(values)


def test_kinds_that_were_not_chosen_are_not_added():
  values = json.loads(tiny_config().to_json())
  values["code"]["kinds"] = {"file": 1.0}
  assert from_saved(values).code.kinds == {"file": 1.0}
