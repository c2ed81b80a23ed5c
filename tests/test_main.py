"""The command line as a stranger meets it: exit codes, one-line errors, and a run that is killed and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import ultrathink_jax
from ultrathink_jax import api, main

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("main")  # one process makes the shared run
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "far", "away"]
TINY = """
from configs import base

def get_config():
  config = base.get_config()
  config.model.update(
    layers="MAFE", vocab_size=300, embed_dim=32, dtype="float32", remat="none", num_heads=2, num_kv_heads=1,
    head_dim=16, mlp_dim=48, num_experts=4, expert_dim=24, mamba_state_dim=8, mamba_head_dim=16, mamba_chunk_tokens=8)
  config.data.source = "text:" + TEXT
  config.optimizer.update(learning_rate=3e-3, warmup_steps=5)
  config.train.update(steps=60, batch_size=8, sequence_length=32, log_every_steps=3)
  config.evaluate.update(every_steps=20, num_batches=2)
  config.checkpoint.every_steps = 7
  config.generate.max_new_tokens = 16
  return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Returns the path of a tiny configuration over a folder of generated text."""
  folder = tmp_path_factory.mktemp("text")
  words = random.Random(0)
  for number in range(40):
    sentences = (" ".join(words.choices(WORDS, k=9)) for _ in range(30))
    (folder / f"{number}.txt").write_text(".\n".join(sentences))
  path = folder / "tiny.py"
  path.write_text(f"TEXT = {str(folder / '*.txt')!r}\n{TINY}")
  return path


def command(config, workdir, *flags):
  return [sys.executable, "-m", "ultrathink_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]


def run(config, workdir, *flags):
  environment = os.environ | {"XLA_FLAGS": ""}
  return subprocess.run(command(config, workdir, *flags), capture_output=True, text=True, cwd=ROOT, env=environment)


def lines(workdir):
  """Returns {step: (loss, gradient norm)} as written."""
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """Returns the workdir and the output of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  result = run(config, workdir)
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


def test_a_run_learns_and_leaves_what_it_promises(finished):
  workdir, output = finished
  losses = [loss for loss, _ in lines(workdir).values()]
  assert losses[0] == pytest.approx(np.log(300), abs=0.1)
  assert losses[-1] < losses[0] - 1
  assert {path.name for path in workdir.iterdir()} >= {
    "metrics.jsonl", "evaluations.jsonl", "tensorboard", "checkpoints", "config.json", "run.json", "report.html"
  }  # fmt: skip
  assert "[result] validation:" in output
  assert "gzip -9" in output
  assert "[sample]" in output


def test_a_killed_run_resumes_to_the_same_bits(config, finished, tmp_path):
  whole, _ = finished
  workdir, kill_after = tmp_path / "killed", random.Random(1).randrange(5, 15)
  environment = os.environ | {"XLA_FLAGS": ""}
  process = subprocess.Popen(command(config, workdir), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
  metrics = workdir / "metrics.jsonl"
  while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < kill_after):
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert 0 < len(metrics.read_bytes().splitlines()) < 21
  result = run(config, workdir)
  assert result.returncode == 0, result.stderr
  assert "[resume] from step" in result.stdout
  assert lines(workdir) == lines(whole)
  api.load(whole).save_pretrained(tmp_path / "a")
  api.load(workdir).save_pretrained(tmp_path / "b")
  for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
    np.testing.assert_array_equal(load_file(tmp_path / "b" / "model.safetensors")[name], tensor)


def test_data_is_shown_without_any_device(config, tmp_path):
  environment = os.environ | {"JAX_PLATFORMS": "none"}  # which ends whatever looks for a device
  result = subprocess.run(
    command(config, tmp_path / "x", "--mode=data"), capture_output=True, text=True, cwd=ROOT, env=environment
  )
  assert result.returncode == 0, result.stderr
  assert "the run   60 steps of 8 x 32 = 15,360 positions" in result.stdout
  assert "[begins]" in result.stdout
  facts = json.loads((tmp_path / "x" / "data.json").read_text())
  assert facts["splits"]["train"]["documents"] + facts["splits"]["validation"]["documents"] == 40
  assert "<h1>x</h1>" in (tmp_path / "x" / "data.html").read_text()


def test_other_data_does_not_replace_the_tokenizer_of_a_run(config, finished):
  workdir, _ = finished
  before = (workdir / "data" / "tokenizer" / "tokenizer.model").read_bytes()
  result = run(config, workdir, "--mode=data", "--config.data.source=stdlib")
  assert result.returncode == 2
  assert "data.source was" in result.stderr
  assert (workdir / "data" / "tokenizer" / "tokenizer.model").read_bytes() == before


def test_the_same_command_on_a_finished_run_trains_no_more(config, finished):
  workdir, _ = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  result = run(config, workdir)
  assert result.returncode == 0, result.stderr
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_evaluate_and_generate_read_the_checkpoint(config, finished):
  workdir, output = finished
  result = run(config, workdir, "--mode=evaluate")
  assert result.returncode == 0, result.stderr
  evaluation = json.loads((workdir / "evaluation.json").read_text())
  assert f"{evaluation['bits_per_byte']:.3f} bits per byte" in output
  result = run(config, workdir, "--mode=generate", "--prompt=the cat", "--prompt=two dogs")
  assert result.returncode == 0, result.stderr
  assert "the cat" in result.stdout
  assert "two dogs" in result.stdout


def test_a_loaded_model_gives_logits_text_and_a_copy_of_itself(finished, tmp_path):
  workdir, _ = finished
  model = ultrathink_jax.load(workdir)
  assert model.step == 60
  tokens = np.array([[model.tokenizer.bos_id, *model.tokenizer.encode("the cat sat on a mat")]])
  logits = np.asarray(model.logits(tokens))
  assert logits.shape == (1, tokens.shape[1], 300)
  assert isinstance(model.generate(["the cat"], max_new_tokens=4)[0], str)
  model.save_pretrained(tmp_path / "saved")
  again = ultrathink_jax.load(tmp_path / "saved")
  np.testing.assert_array_equal(np.asarray(again.logits(tokens)), logits)
  assert again.generate(["a"], temperature=0.0, max_new_tokens=8) == model.generate(
    ["a"], temperature=0.0, max_new_tokens=8
  )


def test_a_workdir_of_another_run_is_refused(config, finished):
  result = run(config, finished[0], "--config.optimizer.learning_rate=0.1")
  assert result.returncode == 2
  assert "optimizer.learning_rate was 0.003 and is 0.1" in result.stderr


@pytest.mark.parametrize(
  ("flags", "code", "words"),
  [
    (["--config.train.stesp=5"], 2, ["stesp", "steps"]),
    (["--config.trian.steps=5"], 2, ["trian", "train"]),
    (["--config.train.steps=abc"], 2, ["train.steps=abc"]),
    (["--confg=1"], 2, ["confg"]),
    (["--mode=trian"], 2, ["trian"]),
    (["extra"], 2, ["'extra' is not a flag"]),
    (["--config.model.layers=(AZ)x2"], 2, ["character 3 ('Z')"]),
    (["--config.model.num_heads=3", "--config.model.num_kv_heads=2"], 2, ["num_heads=3", "num_kv_heads in 1, 3"]),
    (["--config.recipe=pretrian"], 2, ["pretrian", "pretrain"]),
    (["--config.data.source=text:/no/such/path"], 3, ["/no/such/path"]),
    (["--config.data.source=txt:/tmp"], 2, ["txt"]),
    (["--mode=generate"], 2, ["--prompt"]),
    (["--mode=generate", "--prompt=x"], 4, ["neither a workdir with checkpoints"]),
  ],
)
def test_a_mistake_ends_in_one_line_and_its_exit_code(config, tmp_path, capsys, flags, code, words):
  with pytest.raises(SystemExit) as exit_:
    main.main(["main", f"--config={config}", f"--workdir={tmp_path / 'none'}", *flags])
  error = capsys.readouterr().err
  assert exit_.value.code == code
  assert error.count("\n") == 1
  for word in words:
    assert word in error


def test_a_model_too_large_for_the_machine_is_refused_with_the_numbers(tmp_path, capsys):
  config = ROOT / "configs" / "ultra3b.py"
  with pytest.raises(SystemExit) as exit_:
    main.main(["main", f"--config={config}", f"--workdir={tmp_path}"])
  assert exit_.value.code == 2
  assert "needs" in (error := capsys.readouterr().err)
  assert "can give" in error


def test_describe_prints_the_counts(tmp_path, capsys):
  with pytest.raises(SystemExit) as exit_:
    main.main(["main", f"--config={ROOT / 'configs' / 'ultra3b.py'}", f"--workdir={tmp_path}", "--mode=describe"])
  assert exit_.value.code == 0
  output = capsys.readouterr().out
  assert "3,036,876,032" in output
  assert "1,281,559,808" in output
  assert json.loads((tmp_path / "describe.json").read_text())["parameters_total"] == 3_036_876_032
