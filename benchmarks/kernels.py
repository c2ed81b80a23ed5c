"""Prints how fast every form of every kernel is at the widths of a shape, or with --memory what memory it takes.

    python -m benchmarks.kernels --shape=small --dtype=float32
    python -m benchmarks.kernels --shape=small --dtype=float32 --memory

Speed: the best of several runs, forward alone and with the backward pass, against a matrix product (FLOP/s) or a
stream over memory (bytes/s) measured in the same run. Operations are those of the mathematics, forward once and
backward twice, so that a form which recomputes shows less. Causal attention counts half of its square.

Memory: what the compiler sets aside for forward and backward beside inputs and outputs, as it reports it. Growth in
proportion to the length is linear; 1.00 in the last column says exactly so.

Letters: B batch  T length  D embed  N query heads  K kv heads or groups  H head dim  V vocab  E experts  F expert
width; Mamba: P head dim, Z state size.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import environment, options
from benchmarks.limits import Limit, best_seconds, measured_bandwidth, measured_flops
from benchmarks.shapes import with_batch
from ultrathink_jax.config import Config
from ultrathink_jax.kernels.attention import Scoring
from ultrathink_jax.kernels.backends import ATTENTION, EXPERTS, SSD
from ultrathink_jax.kernels.conv1d import conv1d
from ultrathink_jax.kernels.cross_entropy import cross_entropy
from ultrathink_jax.kernels.cross_entropy_chunked import cross_entropy_chunked
from ultrathink_jax.parallel.devices import compiler_options, describe_devices

_CAPACITY_FACTOR = 1.25


def _experts_at_capacity(x: jax.Array, choices: jax.Array, gates: jax.Array, *kernels: jax.Array) -> Any:
  """Returns what the form "capacity" does with a quarter more rows an expert than its even share."""
  capacity = math.ceil(_CAPACITY_FACTOR * choices.size / kernels[0].shape[0])
  return EXPERTS["capacity"](x, choices, gates, *kernels, capacity)


FORMS: dict[str, dict[str, Callable[..., Any]]] = {
  "attention": ATTENTION,
  "ssd": SSD,
  "experts": EXPERTS | {"capacity": _experts_at_capacity},
  "cross_entropy": {"reference": cross_entropy, "chunked": cross_entropy_chunked},
  "conv1d": {"reference": conv1d},
}
_MEMORY_LENGTHS = (8192, 16384, 32768, 65536)
_MEMORY_VOCAB = 50257


class Problem(NamedTuple):
  """One kernel at one size.

  Attributes:
    inputs: the arrays that gradients are taken of.
    call: (form, inputs) -> the result, one array.
    flops: of the forward pass; 0 where memory is the limit.
    forward_bytes: read and written by the forward pass at least, where memory is the limit.
    both_bytes: the same of forward and backward.
  """

  inputs: tuple[jax.ShapeDtypeStruct, ...]
  call: Callable[[Callable[..., Any], tuple[jax.Array, ...]], jax.Array]
  flops: float = 0.0
  forward_bytes: float = 0.0
  both_bytes: float = 0.0


def make_problem(kernel: str, config: Config) -> Problem:
  """Returns the kernel's problem at the widths and the batch of `config`; each row is one document."""
  model, (B, T) = config.model, (config.train.batch_size, config.train.sequence_length)
  array = lambda *shape, dtype=model.dtype: jax.ShapeDtypeStruct(shape, dtype)
  D, N, K, H, V = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size
  segments = jnp.ones((B, T), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  if kernel == "attention":
    where = (positions, positions, segments, segments, Scoring(H**-0.5))
    call = lambda form, inputs: form(*inputs, *where)
    return Problem((array(B, T, N, H), array(B, T, K, H), array(B, T, K, H)), call, flops=4 * B * N * H * T * T / 2)
  if kernel == "ssd":
    N, P, K, Z = model.mamba_heads, model.mamba_head_dim, model.mamba_num_groups, model.mamba_state_dim
    Q = model.mamba_chunk_tokens

    def call(form, inputs):
      x, dt, a, b, c = inputs
      return form(x, jax.nn.softplus(dt), -jnp.exp(a), b, c, segments, None, Q)[0]

    inputs = (array(B, T, N, P), array(B, T, N, dtype="float32"), array(N, dtype="float32"))
    return Problem((*inputs, array(B, T, K, Z), array(B, T, K, Z)), call, 2 * B * T * N * (Q / 2 * (Z + P) + 2 * Z * P))
  if kernel == "experts":
    E, F, chosen = model.num_experts, model.expert_dim, model.experts_per_token
    _, choices = jax.lax.top_k(jax.random.uniform(jax.random.key(1), (B * T, E)), chosen)
    gates = jnp.full((B * T, chosen), 1 / chosen)
    call = lambda form, inputs: form(inputs[0], choices, gates, *inputs[1:])[0]
    return Problem(
      (array(B * T, D), array(E, D, F), array(E, D, F), array(E, F, D)), call, flops=6 * B * T * chosen * D * F
    )
  if kernel == "cross_entropy":
    targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
    call = lambda form, inputs: form(*inputs, targets, weights)
    return Problem((array(B, T, D), array(V, D, dtype="float32")), call, flops=2 * B * T * D * V)
  if kernel == "conv1d":
    width, channels = model.mamba_conv_width, model.mamba_heads * model.mamba_head_dim
    one = B * T * channels * jnp.dtype(model.dtype).itemsize
    # Forward reads x and writes y; backward reads x and y's gradient and writes x's.
    call = lambda form, inputs: form(*inputs, None, segments)
    return Problem((array(B, T, channels), array(width, channels)), call, forward_bytes=2 * one, both_bytes=5 * one)
  raise ValueError(f"{kernel!r} is not one of {', '.join(FORMS)}")


def forward(problem: Problem, form: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> jax.Array:
  return problem.call(form, inputs)


def forward_and_backward(problem: Problem, form: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> Any:
  """Returns the result and the gradients, for a gradient of the result that is not constant."""
  out, pull_back = jax.vjp(partial(problem.call, form), inputs)
  return out, pull_back(jnp.cos(out))


def _compile(function: Callable[..., Any], problem: Problem, form: Callable[..., Any]) -> jax.stages.Compiled:
  lowered = jax.jit(partial(function, problem, form)).lower(problem.inputs)
  return lowered.compile(compiler_options=compiler_options(problem.inputs[0].dtype.name))


def speeds(
  kernel: str, config: Config, matmul: Limit, bandwidth: Limit, repeats: int, form_names: Sequence[str]
) -> list[list[str]]:
  """Returns a line of the table for each form of the kernel that is among the names, or for all if there are none."""
  problem = make_problem(kernel, config)
  keys = jax.random.split(jax.random.key(0), len(problem.inputs))
  inputs = tuple(jax.random.normal(k, s.shape, s.dtype) * 0.1 for k, s in zip(keys, problem.inputs, strict=True))
  rows = []
  for name, form in FORMS[kernel].items():
    if form_names and name not in form_names:
      continue
    row = [kernel, name]
    if name == "pallas" and describe_devices().platform == "cpu":
      rows.append([*row, "interpreted here, not timed", *[""] * 5])
      continue
    work = (
      (forward, problem.flops, problem.forward_bytes),
      (forward_and_backward, 3 * problem.flops, problem.both_bytes),
    )
    for function, flops, moved_bytes in work:
      try:
        seconds = best_seconds(_compile(function, problem, form), inputs, repeats=repeats)
      except Exception as error:  # a form that this machine does not have is a line of the table
        row += [f"does not run here: {type(error).__name__}", "", ""]
        continue
      rate, limit, unit = (flops, matmul, "GFLOP/s") if flops else (moved_bytes, bandwidth, "GB/s")
      row += [f"{1e3 * seconds:,.2f}", f"{rate / seconds / 1e9:,.1f} {unit}", f"{rate / seconds / limit.rate:.0%}"]
    rows.append(row)
  return rows


def temporary_bytes(kernel: str, form: str, config: Config) -> int:
  """Returns what forward and backward need beside inputs and outputs; compiles and runs nothing."""
  compiled = _compile(forward_and_backward, make_problem(kernel, config), FORMS[kernel][form])
  return compiled.memory_analysis().temp_size_in_bytes


def memory_lines(config: Config, lengths: Sequence[int], vocab_size: int) -> list[str]:
  """Returns the tables of the scan over lengths and of the cross-entropy over forms, both of one row of tokens."""
  rows, first = [], None
  for length in lengths:
    used = temporary_bytes("ssd", "chunked", with_batch(config, 1, length))
    first = first or used / length
    rows.append([f"{length:,}", f"{used / 2**20:,.1f}", f"{used / length:,.0f}", f"{used / length / first:.2f}"])
  B, T = config.train.batch_size, config.train.sequence_length
  logits_bytes = B * T * vocab_size * 4
  large_vocab = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
  losses = []
  for form in FORMS["cross_entropy"]:
    used = temporary_bytes("cross_entropy", form, large_vocab)
    losses.append([form, f"{used / 2**20:,.1f}", f"{logits_bytes / 2**20:,.1f}", f"{used / logits_bytes:.2f}"])
  return [
    f"State-space scan (chunked), forward and backward of one row, {config.model.dtype}:",
    "",
    environment.table(["tokens", "temporary MiB", "bytes per token", "relative to the first"], rows),
    "",
    f"Cross-entropy, forward and backward of {B} x {T} tokens over a vocabulary of {vocab_size:,}:",
    "",
    environment.table(["form", "temporary MiB", "logits (B T V 4 bytes) MiB", "ratio"], losses),
  ]


def main(argv: Sequence[str]) -> None:
  values, holder = options.define(argv)
  flags.DEFINE_multi_enum("kernel", list(FORMS), list(FORMS), "Which; may be repeated.", flag_values=values)
  flags.DEFINE_list("forms", [], "Which forms of them; all unless given.", flag_values=values)
  flags.DEFINE_integer("repeats", 5, "Runs of which the best counts.", lower_bound=1, flag_values=values)
  flags.DEFINE_bool("memory", False, "Memory instead of speed.", flag_values=values)
  flags.DEFINE_multi_integer("length", _MEMORY_LENGTHS, "Tokens of --memory.", flag_values=values)
  flags.DEFINE_integer("vocab_size", _MEMORY_VOCAB, "Of --memory.", flag_values=values)
  name, config = options.read(values, holder, argv)
  if values.memory:
    options.publish(f"memory {name}", memory_lines(config, values.length, values.vocab_size), values.write)
    return
  matmul, bandwidth = measured_flops(config.model.dtype), measured_bandwidth()
  rows = [
    row for kernel in values.kernel for row in speeds(kernel, config, matmul, bandwidth, values.repeats, values.forms)
  ]
  header = ["kernel", "form", "forward ms", "rate", "of limit", "with backward ms", "rate", "of limit"]
  lines = [
    f"- widths of {name}; batch: {config.train.batch_size} x {config.train.sequence_length} tokens",
    f"- limits: {matmul.rate / 1e9:,.0f} GFLOP/s ({matmul.source});",
    f"  {bandwidth.rate / 1e9:,.1f} GB/s ({bandwidth.source})",
    "",
    environment.table(header, rows),
  ]
  options.publish(f"kernels {name}", lines, values.write)


if __name__ == "__main__":
  environment.restart_with_product_settings()
  main(sys.argv)
