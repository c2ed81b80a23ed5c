"""Prints how fast our train step is: tokens per second, MFU, compile time and peak memory.

    python -m benchmarks.step_time --shape=tiny --model=hybrid --dtype=float32
    python -m benchmarks.step_time --config=configs/ultra3b.py --config.train.batch_size=2 --write
    python -m benchmarks.step_time --shape=1.3b --profile=DIR  # and which operations the time goes to

The step is the trainer's (benchmarks/ours.py). MFU counts the FLOPs of models/counts.py, without any recomputation.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import environment, options
from benchmarks.limits import peak_flops
from benchmarks.ours import OurTraining
from ultrathink_jax.kernels import backends
from ultrathink_jax.models.counts import count_model, train_flops_per_token
from ultrathink_jax.parallel.devices import describe_devices, peak_memory_bytes
from ultrathink_jax.train.profiling import Profiler

_TRACED_STEPS = 2


def main(argv: Sequence[str]) -> None:
  values, holder = options.define(argv)
  flags.DEFINE_integer("rounds", 5, "How often steps are timed.", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("steps", 5, "Steps of a round.", lower_bound=1, flag_values=values)
  flags.DEFINE_float("peak_tflops", None, "Of one device, instead of its data sheet's.", flag_values=values)
  flags.DEFINE_string("profile", None, "Directory for a trace of two more steps.", flag_values=values)
  name, config = options.read(values, holder, argv)
  peak = peak_flops(config.model.dtype, values.peak_tflops)
  run = OurTraining(config)
  run(1)
  speeds = [values.steps * run.tokens_per_call / run(values.steps) for _ in range(values.rounds)]
  count, train, num_devices = count_model(config.model), config.train, describe_devices().count
  flops = train_flops_per_token(config.model, count, train.sequence_length)
  mfu = statistics.median(speeds) * flops / (peak.rate * num_devices)
  lines = [
    f"- model: {name}, {config.model.layers}, {count.total:,} parameters, {count.active:,} active, "
    f"{config.model.dtype}, remat {config.model.remat}",
    f"- step: {train.batch_size} x {train.sequence_length} tokens in {train.accumulation_steps} micro-batches, "
    f"{config.optimizer.name}",
    f"- kernels: {', '.join(f'{letter} {form}' for letter, form in backends.describe(config.model).items())}",
    f"- tokens/s: {environment.spread(speeds)}: median and range of {values.rounds} rounds of {values.steps} steps",
    f"- step: {run.tokens_per_call / statistics.median(speeds):.4f} s",
    f"- compile: {run.compile_seconds:.1f} s",
    f"- MFU: {mfu:.1%} of {num_devices} x {peak.rate / 1e12:,.2f} TFLOP/s ({peak.source})",
    f"- FLOPs per token: {flops:,.0f}, forward and backward, nothing recomputed: 6 x active parameters (the output "
    "projection counted, the embedding table not) + 12 x heads x head dim x mean visible keys (T/2) per attention "
    "layer + 6 x heads x (Q/2 (Z + P) + 2 Z P) per Mamba layer (chunk Q, state Z, head dim P)",
    f"- peak memory: {peak_memory_bytes() / 2**30:.2f} GiB, of the device or, on CPU, of the whole process",
    f"- loss: {run.first_loss:.4f} at the first step, {run.loss:.4f} at the last, on one batch of random tokens",
  ]
  if values.profile is not None:
    profiler = Profiler(f"1:{_TRACED_STEPS}", Path(values.profile), print)
    for done in range(_TRACED_STEPS):
      with profiler.step(done):
        run(1)
  options.publish(name, lines, values.write)


if __name__ == "__main__":
  environment.restart_with_product_settings()
  main(sys.argv)
