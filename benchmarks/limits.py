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
_MATMUL_DIM = 2048
_STREAM_BYTES = 2**28  # of each array that is streamed; larger than any cache


class Limit(NamedTuple):
  """FLOP/s or bytes/s, and where the number comes from."""

  rate: float
  source: str


def best_seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
  """Returns the shortest time of several runs after a first one that is not counted."""
  jax.block_until_ready(function(*arguments))
  seconds = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    seconds.append(time.perf_counter() - begun)
  return min(seconds)


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
  """Returns the FLOP/s of a square matrix product, the best of several."""
  a = jnp.ones((_MATMUL_DIM, _MATMUL_DIM), dtype)
  seconds = best_seconds(jax.jit(lambda a, b: a @ b), a, a)
  shape = " x ".join([str(_MATMUL_DIM)] * 3)
  return Limit(2 * _MATMUL_DIM**3 / seconds, f"measured in this run: {shape} product in {dtype}")


def measured_bandwidth() -> Limit:
  """Returns the bytes/s of a = b + s c over large arrays (two reads, one write), the best of several."""
  b, c = jnp.ones(_STREAM_BYTES // 4), jnp.ones(_STREAM_BYTES // 4)
  seconds = best_seconds(jax.jit(lambda b, c: b + 3 * c), b, c)
  return Limit(
    3 * _STREAM_BYTES / seconds, f"measured in this run: a = b + s c over {_STREAM_BYTES / 2**20:.0f} MiB each"
  )
