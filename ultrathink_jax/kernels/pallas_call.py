"""One Pallas program for three platforms: Mosaic on TPU, Triton on GPU, and the interpreter on CPU."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl

# A kernel here keeps whole rows of keys or tokens in a TPU core's vector memory, of which the compiler grants 16 MiB
# unless told otherwise; cores have 64 MiB (v5p) or 128 MiB (v5e, v6e).
_TPU_VMEM_BYTES = 56 * 2**20


def on_platform(function: Callable[..., Any], *arrays: Any) -> Any:
  """Returns function(platform, *arrays) where platform, "cpu", "cuda" or "tpu", is the one that is compiled for."""
  branches = {platform: partial(function, platform) for platform in ("cpu", "cuda", "tpu")}
  return jax.lax.platform_dependent(*arrays, **branches)


def pallas_call(
  kernel: Callable[..., None],
  platform: str,
  *,
  grid: tuple[int, ...],
  in_specs: Sequence[pl.BlockSpec],
  out_specs: Any,
  out_shape: Any,
  num_warps: int,
  num_stages: int,
) -> Callable[..., Any]:
  """Returns the compiled kernel; `num_warps` and `num_stages` are of Triton."""
  params = None
  if platform == "cuda":
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  elif platform == "tpu":
    from jax.experimental.pallas import tpu

    params = tpu.CompilerParams(vmem_limit_bytes=_TPU_VMEM_BYTES)
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    interpret=platform == "cpu",
    compiler_params=params,
    name=kernel.__name__ if hasattr(kernel, "__name__") else kernel.func.__name__,
  )


def scalars(platform: str, shape: tuple[int, ...]) -> pl.BlockSpec:
  """Returns the spec of a small array that every program reads numbers from, one at a time."""
  if platform == "tpu":
    from jax.experimental.pallas import tpu

    return pl.BlockSpec(memory_space=tpu.SMEM)
  return pl.BlockSpec(shape, lambda *program: (0,) * len(shape))


def whole_rows(
  platform: str, shape: tuple[int | None, ...], index: Callable[..., Any], buffers: int = 1
) -> pl.BlockSpec:
  """Returns the spec of an array of which a program may read all tokens of a row.

  On TPU it lies on chip, by default without a second buffer for the row after it, which few programs ever wait for.
  """
  if platform == "tpu":
    return pl.BlockSpec(shape, index, pipeline_mode=pl.Buffered(buffers))
  return pl.BlockSpec(shape, index)


def power_of_two(number: int, smallest: int = 16) -> int:
  """Returns the least power of two that is not below `number` or `smallest`; Triton multiplies no other sizes."""
  return max(smallest, pl.next_power_of_2(number))
