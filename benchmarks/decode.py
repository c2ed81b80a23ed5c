"""Prints how fast we read prompts and decode, beside the rate that memory bandwidth allows.

    python -m benchmarks.decode --shape=tiny --model=mamba --dtype=float32 --batch_sizes=1,8

Both come from timing two whole generations of `generate` (a few tokens, and many): decoding is their difference,
prefill what is left of the short one. Medians over rounds. Greedy, unless --temperature says how to sample.

The bound: every token of a batch reads all weights that its rows use, once in the compute dtype, and the caches, so it
cannot be made faster than bytes / bandwidth. Of E experts of which a token takes K, a batch of B uses
E (1 - (1 - K/E)^B) on average. State of fixed size is read and written; keys and values are read at their mean length.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence

from absl import flags

from benchmarks import environment, options
from benchmarks.limits import measured_bandwidth
from benchmarks.ours import GREEDY, OurDecoding
from ultrathink_jax.config import GenerateConfig, ModelConfig
from ultrathink_jax.models.counts import count_model

_FIRST_TOKENS = 16


def bytes_per_step(model: ModelConfig, batch_size: int, cached_tokens: float) -> float:
  """Returns the bytes that decoding one token for every row of a batch must move."""
  count = count_model(model)
  used = 1.0
  if model.num_experts > model.experts_per_token:
    chosen = model.num_experts * (1 - (1 - model.experts_per_token / model.num_experts) ** batch_size)
    used = (chosen - model.experts_per_token) / (model.num_experts - model.experts_per_token)
  table = 0 if model.tie_embeddings else count.embedding
  weights = count.active - table + used * (count.total - count.active)
  item_bytes = 2 if model.dtype == "bfloat16" else 4
  cache = cached_tokens * count.cache_bytes_per_token + 2 * count.cache_bytes_fixed
  return weights * item_bytes + batch_size * cache


def _described(sampling: GenerateConfig) -> str:
  if sampling.temperature == 0:
    return "greedy"
  return f"temperature {sampling.temperature:g}, top k {sampling.top_k or 'all'}, top p {sampling.top_p:g}"


def main(argv: Sequence[str]) -> None:
  values, holder = options.define(argv)
  flags.DEFINE_list("batch_sizes", ["1", "8"], "Sequences decoded at once.", flag_values=values)
  flags.DEFINE_integer("prompt_tokens", 128, "Of each sequence.", lower_bound=2, flag_values=values)
  flags.DEFINE_integer("new_tokens", 64, "Of each sequence.", lower_bound=1, flag_values=values)
  flags.DEFINE_float("temperature", 0.0, "Of sampling; 0: greedy.", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("top_k", 0, "Likeliest tokens that are kept; 0: all.", lower_bound=0, flag_values=values)
  flags.DEFINE_float("top_p", 1.0, "Probability that is kept.", 0, 1, flag_values=values)
  flags.DEFINE_integer("rounds", 5, "How often generation is timed.", lower_bound=1, flag_values=values)
  name, config = options.read(values, holder, argv)

  sampling = dataclasses.replace(GREEDY, temperature=values.temperature, top_k=values.top_k, top_p=values.top_p)
  bandwidth = measured_bandwidth()
  prompt, new, rows = values.prompt_tokens, values.new_tokens, []
  for batch_size in map(int, values.batch_sizes):
    run = OurDecoding(config, batch_size, prompt, new, _FIRST_TOKENS, sampling)
    short = [run.generation_seconds(_FIRST_TOKENS) for _ in range(values.rounds)]
    step_seconds = statistics.median(run(1) for _ in range(values.rounds)) / new
    prefill_seconds = statistics.median(short) - _FIRST_TOKENS * step_seconds
    moved = bytes_per_step(config.model, batch_size, prompt + _FIRST_TOKENS + new / 2)
    rate, bound = batch_size / step_seconds, batch_size * bandwidth.rate / moved
    prefill = f"{batch_size * prompt / prefill_seconds:,.0f}" if prefill_seconds > 0 else "too short to tell"
    rows.append(
      [str(batch_size), prefill, f"{rate:,.1f}", f"{moved / 2**20:,.1f}", f"{bound:,.1f}", f"{rate / bound:.0%}"]
    )
  header = ["batch", "prefill tokens/s", "decode tokens/s", "MiB per step", "bound tokens/s", "of the bound"]
  lines = [
    f"- model: {name}, {config.model.layers}, {count_model(config.model).total:,} parameters, {config.model.dtype}",
    f"- prompts of {prompt} tokens, {new} more tokens after the first {_FIRST_TOKENS}, {_described(sampling)}",
    f"- bandwidth: {bandwidth.rate / 1e9:,.1f} GB/s ({bandwidth.source})",
    "",
    environment.table(header, rows),
  ]
  options.publish(f"decode {name}", lines, values.write)


if __name__ == "__main__":
  environment.restart_with_product_settings()
  main(sys.argv)
