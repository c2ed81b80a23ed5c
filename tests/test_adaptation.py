"""A model is adapted by the command line: base, adapters, evaluation beside the base, adapters and models as files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import ultrathink_jax
from ultrathink_jax.types import Adapted

ROOT = Path(__file__).parent.parent
TINY = """
from configs import base

def get_config():
  config = base.get_config()
  config.model.update(
    layers="(AE)x2", vocab_size=300, embed_dim=16, dtype="float32", remat="none", num_heads=2, num_kv_heads=2,
    head_dim=8, num_experts=4, expert_dim=16, mamba_head_dim=8)
  config.data.source = "text:" + FOLDER + "/*.txt"
  config.optimizer.update(learning_rate=3e-3, warmup_steps=2)
  config.train.update(steps=20, batch_size=4, sequence_length=32, log_every_steps=5)
  config.evaluate.update(every_steps=0, num_batches=2, samples=1, documents=4)
  config.checkpoint.update(every_steps=6)
  config.generate.max_new_tokens = 2
  return config
"""
TARGETS = "--config.lora.targets=('attention','experts')"
LORA = ("--config.lora.rank=2", "--config.optimizer.learning_rate=0.02")


def run(*flags, code=0):
  """Returns what a program that ends with `code` printed."""
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
  command = [sys.executable, "-m", "ultrathink_jax.main", *map(str, flags)]
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
  assert result.returncode == code, result.stderr
  return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with two configurations, of texts of other words each, and a trained base."""
  folder = tmp_path_factory.mktemp("adaptation")
  for name, words in (("old", "the cat sat on a mat and saw dogs"), ("new", "int float struct void return while")):
    (folder / name).mkdir()
    chosen = random.Random(0)
    for number in range(30):
      text = ".\n".join(" ".join(chosen.choices(words.split(), k=9)) for _ in range(12))
      (folder / name / f"{number}.txt").write_text(text)
    (folder / f"{name}.py").write_text(f"FOLDER = {str(folder / name)!r}\n{TINY}")
  run(f"--config={folder / 'old.py'}", f"--workdir={folder / 'base'}")
  return folder


def adapt(folder, name, *flags, base="base", code=0):
  init_from = f"--config.checkpoint.init_from={folder / base}"
  return run(f"--config={folder / 'new.py'}", f"--workdir={folder / name}", init_from, *LORA, *flags, code=code)


@pytest.fixture(scope="module")
def adapted(folder):
  adapt(folder, "adapted", TARGETS)
  return folder / "adapted"


def test_adapters_are_all_that_changes_and_all_that_is_saved(folder, adapted):
  model, base = ultrathink_jax.load(adapted), ultrathink_jax.load(folder / "base")
  assert isinstance(model.params, Adapted)
  jax.tree.map(np.testing.assert_array_equal, model.params.params, base.params)
  assert model.tokenizer.fingerprint == base.tokenizer.fingerprint
  saved = sum(path.stat().st_size for path in (adapted / "checkpoints" / "20" / "params").rglob("*") if path.is_file())
  whole = sum(path.stat().st_size for path in (folder / "base/checkpoints/20/params").rglob("*") if path.is_file())
  assert saved < whole / 2
  tokens = np.array([[model.tokenizer.bos_id, 7, 9, 30, 31]])
  assert np.abs(model.logits(tokens) - base.logits(tokens)).max() > 1e-2
  assert len(model.generate(["the cat"], max_new_tokens=3)) == 1


@pytest.mark.slow
def test_an_adapted_run_that_is_killed_goes_on_to_the_same_adapters(folder, adapted, monkeypatch):
  monkeypatch.setenv("ULTRATHINK_FAULTS", "kill@16")
  adapt(folder, "resumed", TARGETS, code=-9)
  monkeypatch.delenv("ULTRATHINK_FAULTS")
  assert "[resume] from step" in adapt(folder, "resumed", TARGETS).stdout
  whole = [json.loads(line)["loss"] for line in (adapted / "metrics.jsonl").read_text().splitlines()]
  again = [json.loads(line)["loss"] for line in (folder / "resumed/metrics.jsonl").read_text().splitlines()]
  assert whole == again


def test_evaluation_sets_the_adapted_model_beside_its_base(folder, adapted):
  said = adapt(folder, "adapted", TARGETS, "--mode=evaluate").stdout
  found = json.loads((adapted / "evaluation_results.json").read_text())
  assert found["finetuned_model"]["loss"] < found["base_model"]["loss"]
  assert found["improvement"]["loss_percent"] > 0
  assert found["forgetting"]["lost_nats_per_target"] is not None
  assert len(found["routing"]) == 2
  assert "[result]" in said
  assert (adapted / "evaluation.html").stat().st_size > 10_000


def test_a_merged_model_and_an_adapter_file_compute_the_same(folder, adapted):
  model = ultrathink_jax.load(adapted)
  tokens = np.arange(24).reshape(2, 12) + 5
  merged, peft, base = folder / "merged", folder / "peft", folder / "base_exported"
  assert "logits differ by" in run("--mode=export", "--merge", f"--workdir={adapted}", f"--output={merged}").stdout
  np.testing.assert_allclose(ultrathink_jax.load(merged).logits(tokens), model.logits(tokens), rtol=0, atol=1e-4)
  run("--mode=export", f"--workdir={adapted}", f"--output={peft}")
  assert json.loads((peft / "adapter_config.json").read_text())["peft_type"] == "LORA"
  run("--mode=export", f"--workdir={folder / 'base'}", f"--output={base}")
  workdir = folder / "imported"
  run("--mode=import", f"--source={peft}", f"--base={base}", f"--workdir={workdir}")
  np.testing.assert_allclose(ultrathink_jax.load(workdir).logits(tokens), model.logits(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("flags", "code", "said"),
  [
    ([], 2, "checkpoint.init_from is empty"),
    (["--config.checkpoint.init_from=no/such"], 4, "neither a workdir"),
    (["--config.checkpoint.init_from=BASE", "--config.lora.targets=('atention',)"], 2, "matches no weight matrix"),
  ],
)
def test_a_base_that_is_not_there_is_one_line(folder, tmp_path, flags, code, said):
  flags = [flag.replace("BASE", str(folder / "base")) for flag in flags]
  own = (f"--config={folder / 'new.py'}", f"--workdir={tmp_path}", "--config.lora.rank=2")
  error = run(*own, *flags, code=code).stderr
  assert said in error
  assert "Traceback" not in error
  assert (tmp_path / "config.json").exists() == ("targets" in "".join(flags))  # without a base the workdir is not taken


@pytest.mark.slow
def test_a_base_that_was_trained_on_is_another_base(folder, adapted):
  run(f"--config={folder / 'old.py'}", f"--workdir={folder / 'base'}", "--config.train.steps=22", "--force")
  assert "over another base" in adapt(folder, "adapted", TARGETS, code=4).stderr
