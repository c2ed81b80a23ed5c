"""Prints what saving costs a run: steps with an asynchronous save every --every steps beside steps without, in turns.

    python -m benchmarks.checkpoints [--shape=tiny --model=dense | --config=configs/nano.py] [--every=50] [--rounds=7]

A round is --every steps and, in one of the two kinds, a save after them, whose commit goes on during the next round:
that round, without a save of its own, pays for it. So a pair of rounds with saves and a pair without are compared.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from benchmarks import environment, options
from benchmarks.ours import OurTraining
from ultrathink_jax.config import Config
from ultrathink_jax.parallel.devices import describe_devices
from ultrathink_jax.train import digests
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on


def main(argv: list[str]) -> None:
  values, holder = options.define(argv)
  flags.DEFINE_integer("every", 50, "Steps between saves.", 1, flag_values=values)
  flags.DEFINE_integer("rounds", 7, "Of each kind.", 3, flag_values=values)
  name, config = options.read(values, holder, argv)
  training = OurTraining(config)
  training(2)
  with tempfile.TemporaryDirectory() as directory:
    lines = measure(training, config, Path(directory), values.every, values.rounds)
  text = "\n".join([f"{name}, {training.parameters:,} parameters, a save every {values.every} steps", "", *lines])
  if values.write:
    environment.write_page(f"checkpoints {name}", describe_devices().kind, text)
  print(text)


def measure(training: OurTraining, config: Config, directory: Path, every: int, rounds: int) -> list[str]:
  """Returns the lines of the table."""
  seconds = {False: [], True: []}
  blocked, committed, digested, verified = [], [], [], []
  with Checkpoints(directory / "checkpoints", config.checkpoint, lambda text: None) as checkpoints:
    for number in range(rounds):
      for is_saving in (number % 2 == 0, number % 2 == 1):
        begun = time.perf_counter()
        training(every)
        if is_saving:
          saved = time.perf_counter()
          checkpoints.save(training.state, number + 1, {})
          blocked.append(time.perf_counter() - saved)
        training(every)
        seconds[is_saving].append((time.perf_counter() - begun) / (2 * every))
        checkpoints.wait()
    for number in range(rounds, 2 * rounds):  # by itself
      saved = time.perf_counter()
      checkpoints.save(training.state, number + 1, {})
      checkpoints.wait()
      committed.append(time.perf_counter() - saved)
      path = directory / "checkpoints" / str(number + 1)
      begun = time.perf_counter()
      digests.read_files(path)
      digested.append(time.perf_counter() - begun)
      begun = time.perf_counter()
      assert digests.find_damage(path) is None
      verified.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    like = shapes_on(training.state, jax.tree.map(lambda leaf: leaf.sharding, training.state))
    jax.block_until_ready(checkpoints.restore(2 * rounds, like)[0])
    restored = time.perf_counter() - begun
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
  disk = _disk_seconds(directory, size)
  plain, saving = statistics.median(seconds[False]), statistics.median(seconds[True])
  step = every * plain
  cost = lambda value: f"{value * 1e3:8.1f} ms  {value / step:6.2%} of {every} steps"
  median = statistics.median
  return [
    f"a step                       {plain * 1e3:8.1f} ms",
    f"a step with saves            {saving * 1e3:8.1f} ms  {2 * (saving / plain - 1):+6.2%} per {every} steps",
    f"blocked in save              {cost(median(blocked))}",
    f"digest and fsync             {cost(median(digested))}",
    f"until committed, by itself   {median(committed) * 1e3:8.1f} ms  for {size / 2**20:.1f} MiB",
    f"verify                       {median(verified) * 1e3:8.1f} ms",
    f"restore                      {restored * 1e3:8.1f} ms",
    f"write and fsync of as much   {disk * 1e3:8.1f} ms  by one plain file",
  ]


def _disk_seconds(directory: Path, size: int) -> float:
  """Returns how long one file of this size takes to reach the disk, the median of three."""
  content, taken = os.urandom(size), []
  for _ in range(3):
    begun = time.perf_counter()
    with open(directory / "plain", "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    taken.append(time.perf_counter() - begun)
  return statistics.median(taken)


if __name__ == "__main__":
  environment.restart_with_product_settings()
  main(sys.argv)
