"""Prints what adapters save beside full fine-tuning, and what a base in few bits saves and loses.

    python -m benchmarks.adapters --shape=small --model=dense [--dtype=float32] [--rank=8] [--write]

Steps are the trainer's own (benchmarks/ours.py) and are timed in turns, a round of each after the other. All runs begin
from one base, which full fine-tuning has taught the batch by heart to some degree: what rounding it loses shows in the
loss at the first step, where adapters add nothing yet. The peak of a process is measured in one of its own.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import environment, options
from benchmarks.ours import OurTraining
from ultrathink_jax.config import Config
from ultrathink_jax.config.lora import QUANTIZED
from ultrathink_jax.parallel.devices import peak_memory_bytes

FULL = "full"
_MIB = 2**20
# Keys of the section `lora` beside the rank.
ADAPTED: dict[str, dict[str, Any]] = {
  "LoRA attention": {"targets": ("attention",)},
  "LoRA all": {"targets": ("all",)},
} | {f"LoRA all, {dtype}": {"targets": ("all",), "base_dtype": dtype} for dtype in ("bfloat16", *QUANTIZED)}


def main(argv: Sequence[str]) -> None:
  values, holder = options.define(argv)
  flags.DEFINE_integer("rank", 8, "Of adapters.", 1, flag_values=values)
  flags.DEFINE_integer("taught", 30, "Steps of full fine-tuning that make the base.", 1, flag_values=values)
  flags.DEFINE_integer("rounds", 5, "How often steps are timed.", 1, flag_values=values)
  flags.DEFINE_integer("steps", 3, "Steps of a round.", 1, flag_values=values)
  flags.DEFINE_string("peak_of", None, "Prints the peak of a process with this kind of run alone.", flag_values=values)
  name, config = options.read(values, holder, argv)
  kinds = {kind: adapted(config, kind, values.rank) for kind in (FULL, *ADAPTED) if is_defined(config, kind)}
  if values.peak_of is not None:
    run = OurTraining(kinds[values.peak_of])
    run(2)
    print(json.dumps(peak_memory_bytes()))
    return
  taught = OurTraining(config)
  taught(values.taught)
  base = jax.device_get(taught.state.params)
  del taught
  runs = {kind: OurTraining(own, base) for kind, own in kinds.items()}
  seconds = time_in_turns(runs, values.rounds, values.steps)
  peaks = {kind: peak_of(kind, argv) for kind in kinds}
  lines = [
    f"- model: {name}, {config.model.layers}, {runs[FULL].parameters:,} parameters",
    f"- step: {config.train.batch_size} x {config.train.sequence_length} tokens, {config.optimizer.name}; adapters of "
    f"rank {values.rank}",
    f"- times: median of {values.rounds} rounds of {values.steps} steps; ratios are to full fine-tuning, of times the "
    "median over rounds and its range",
    "- program: arguments and temporaries of the compiled step; process: the most it ever held, the base before it was "
    "rounded and the compiler included",
    "",
    table(runs, seconds, peaks),
  ]
  options.publish(f"adapters {name}", lines, values.write)


def is_defined(config: Config, kind: str) -> bool:
  return kind != "LoRA attention" or bool({"A", "L"} & set(config.model.layers))


def adapted(config: Config, kind: str, rank: int) -> Config:
  """Returns the configuration of a kind of run."""
  if kind == FULL:
    return config
  return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank, **ADAPTED[kind]))


def time_in_turns(runs: dict[str, OurTraining], rounds: int, steps: int) -> dict[str, list[float]]:
  """Returns the seconds of a step of each run in each round."""
  seconds: dict[str, list[float]] = {kind: [] for kind in runs}
  for run in runs.values():
    run(1)
  for _ in range(rounds):
    for kind, run in runs.items():
      seconds[kind].append(run(steps) / steps)
  return seconds


def peak_of(kind: str, argv: Sequence[str]) -> int:
  """Returns the most memory that a process with this kind of run holds."""
  command = [sys.executable, "-m", "benchmarks.adapters", *argv[1:], f"--peak_of={kind}"]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def table(runs: dict[str, OurTraining], seconds: dict[str, list[float]], peaks: dict[str, int]) -> str:
  """Returns a row for each kind of run."""
  rows, full = [], runs[FULL]
  for kind, run in runs.items():
    ratios = [own / whole for own, whole in zip(seconds[kind], seconds[FULL], strict=True)]
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    cells = [
      f"{trained:,}",
      f"{1e3 * statistics.median(seconds[kind]):,.0f}",
      f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
      f"{run.frozen_bytes / _MIB:,.1f}",
      f"{run.program_bytes / _MIB:,.0f}",
      f"{run.program_bytes / full.program_bytes:.2f}",
      f"{peaks[kind] / _MIB:,.0f}",
      f"{peaks[kind] / peaks[FULL]:.2f}",
      f"{run.first_loss:.4f}",
    ]
    rows.append([kind, *cells])
  memory = ["frozen MiB", "program MiB", "ratio", "process MiB", "ratio"]
  return environment.table(["run", "trained", "ms a step", "ratio", *memory, "loss at first"], rows)


if __name__ == "__main__":
  environment.restart_with_product_settings()
  main(sys.argv)
