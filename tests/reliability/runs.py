"""Tiny runs of the whole program that tests interrupt, and what is left of them."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "far", "away"]
TINY = """
from configs import base

def get_config():
  config = base.get_config()
  config.model.update(
    layers="AFM", vocab_size=300, embed_dim=16, dtype="float32", remat="none", num_heads=2, num_kv_heads=2,
    head_dim=8, mlp_dim=24, mamba_head_dim=8, mamba_state_dim=4, mamba_chunk_tokens=16)
  config.data.source = "text:" + TEXT
  config.optimizer.update(learning_rate=3e-3, warmup_steps=5)
  config.train.update(steps=STEPS, batch_size=4, sequence_length=32, log_every_steps=1)
  config.evaluate.update(every_steps=7, num_batches=2)
  config.checkpoint.update(every_steps=5, keep_last=3)
  config.generate.max_new_tokens = 2
  return config
"""


def make_config(folder, steps):
  """Returns the path of a tiny configuration over text that is generated into `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  words = random.Random(0)
  for number in range(30):
    sentences = (" ".join(words.choices(WORDS, k=9)) for _ in range(30))
    (folder / f"{number}.txt").write_text(".\n".join(sentences))
  path = folder / "tiny.py"
  path.write_text(f"TEXT = {str(folder / '*.txt')!r}\nSTEPS = {steps}\n{TINY}")
  return path


def start(config, workdir, *flags, faults="", launcher=()):
  """Returns a run that has just been started, by the launcher where it is given options."""
  program = ["launch/local.py", *launcher, "--"] if launcher else ["-m", "ultrathink_jax.main"]
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "ULTRATHINK_FAULTS": faults}
  return subprocess.Popen(
    [sys.executable, *program, f"--config={config}", f"--workdir={workdir}", *flags],
    cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def run(*arguments, seconds=250, **options):
  """Returns the output of a run that ends well."""
  program = start(*arguments, **options)
  output, error = program.communicate(timeout=seconds)
  assert program.returncode == 0, error
  return output


def wait_until(program, is_so, seconds=200):
  deadline = time.monotonic() + seconds
  while not is_so():
    assert program.poll() is None, program.communicate()[1][-2000:]
    assert time.monotonic() < deadline
    time.sleep(0.02)


def catches(program, number):
  """Returns whether a program has a handler for a signal by now."""
  for line in Path(f"/proc/{program.pid}/status").read_text().splitlines():
    if line.startswith("SigCgt:"):
      return bool(int(line.split()[1], 16) >> (number - 1) & 1)
  return False


def rows(workdir, name="metrics.jsonl"):
  path = workdir / name
  return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def curve(workdir):
  """Returns what a run computed, to the bit: per step loss, gradient norm and rate, and all evaluations."""
  steps = {row["step"]: (row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows(workdir)}
  return steps, {row["step"]: row["evaluate/loss"] for row in rows(workdir, "evaluations.jsonl")}


def saved_steps(workdir):
  """Returns the steps of the committed checkpoints."""
  return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
