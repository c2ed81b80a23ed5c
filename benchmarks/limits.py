"""What the hardware can do at best: matrix products and memory, from data sheets or measured in the same run."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ultrathink_jax.parallel.devices import describe_devices

# Dense FLOP/s of one device by its data sheet. float32 products run as TensorFloat-32 on these GPUs.
_PEAK_FLOPS = {
  "H200": {"bfloat16": 989.4e12, "float32": 494.7e12},
  "H100": {"bfloat16": 989.4e12, "float32": 494.7e12},
  "A100": {"bfloat16": 312e12, "float32": 156e12},
  "TPU v5 lite": {"bfloat16": 197e12},
  "TPU v5p": {"bfloat16": 459e12},
  "TPU v6 lite": {"bfloat16": 918e12},
}
_MATMUL_DIM = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
_STREAM_BYTES = 2**28  # of each array that is streamed; larger than any cache
_RUN_SECONDS = 0.02


class Limit(NamedTuple):
  """FLOP/s or bytes/s, and where the number comes from."""

  rate: float
  source: str


def best_seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
  """Returns the shortest time of several runs after a first one that is not counted.

  A run is so many calls in a row that they take `_RUN_SECONDS`: what a device does while the next call is prepared.
  """
  jax.block_until_ready(function(*arguments))

  def run(calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
      out = function(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - begun) / calls

  calls = max(1, round(_RUN_SECONDS / run(1)))
  return min(run(calls) for _ in range(repeats))


def peak_flops(dtype: str, peak_tflops: float | None = None) -> Limit:
  """Returns the FLOP/s of one device that MFU is measured against."""
  if peak_tflops is not None:
    return Limit(peak_tflops * 1e12, "--peak_tflops")
  kind = describe_devices().kind
  for name, peaks in _PEAK_FLOPS.items():
    if name in kind and dtype in peaks:
      return Limit(peaks[dtype], f"data sheet of {name}, {dtype}")
  return measured_flops(dtype)


def measured_flops(dtype: str) -> Limit:
  """Returns the FLOP/s of a square product of random matrices, the best of several; zeros would run faster."""
  dim = _MATMUL_DIM[describe_devices().platform]
  a = jax.random.normal(jax.random.key(0), (dim, dim)).astype(dtype)
  seconds = best_seconds(jax.jit(lambda a, b: a @ b), a, a)
  shape = " x ".join([str(dim)] * 3)
  return Limit(2 * dim**3 / seconds, f"measured in this run: {shape} product in {dtype}")


def measured_bandwidth() -> Limit:
  """Returns the bytes/s of a = b + s c over large arrays (two reads, one write), the best of several."""
  b, c = jnp.ones(_STREAM_BYTES // 4), jnp.ones(_STREAM_BYTES // 4)
  seconds = best_seconds(jax.jit(lambda b, c: b + 3 * c), b, c)
  return Limit(
    3 * _STREAM_BYTES / seconds, f"measured in this run: a = b + s c over {_STREAM_BYTES / 2**20:.0f} MiB each"
  )
