"""Frozen kernels in few bits: 8 with a scale a column, or 4 with a scale for every block of rows of a column.

They are plain arrays of ours. qwix 0.1.8 rounds as well, but importing it imports flax.nnx, which jax 0.11 with flax
0.12.8 cannot, and its 4-bit numbers (jnp.int4) are unpacked two to three times as slowly on CPU. Scales of 4-bit blocks
are bfloat16, 0.25 bits a weight; QLoRA's 8-bit scales of scales would save half of that, 3 % of the whole.

Source: arXiv:2305.14314 (NF4), ggml's Q4_0 (the signed scale of int4).
Letters: D in  F out  K blocks  R rows of a block.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.platform import target_platform

_BLOCK_ROWS = 64
_FEWEST_BLOCK_ROWS = 8  # fewer, and scales take more than the 8 bits that int8 takes in all

# The quantiles of a normal distribution that NF4 is made of, and between which a number goes to which.
NF4_LEVELS = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
  *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF4_BOUNDS = (np.array(NF4_LEVELS[1:]) + np.array(NF4_LEVELS[:-1])) / 2


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A kernel [*stack, D, F], each number of which is a level of the format times the scale of its block.

  All dims but D keep their places, so that stacks can be scanned over and every dim be sharded as the kernel's.

  Attributes:
    values: int8 [*stack, D, F]; of 4-bit formats uint8 [*stack, D / 2, F], in which the lower bits are the first half
      of a block's rows and the upper bits the second.
    scales: [*stack, K, F], float32 of int8 and bfloat16 of 4-bit formats.
    format: one of FORMATS.
  """

  values: Any  # not an array where the tree is one of shapes or layouts
  scales: Any
  format: str

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the kernel."""
    *stack, rows, F = self.values.shape
    return *stack, rows * 8 // FORMATS[self.format].bits, F


class Format(NamedTuple):
  """How a block of numbers becomes codes of 8 or 4 bits, and codes numbers.

  Attributes:
    bits: of a code.
    scale: blocks [..., K, R, F] -> the scales [..., K, 1, F] that are kept.
    encode: blocks over their scale -> codes.
    decode: codes -> float32 levels.
  """

  bits: int
  scale: Callable[[Float[Array, "..."]], Float[Array, "..."]]
  encode: Callable[[Float[Array, "..."]], Integer[Array, "..."]]
  decode: Callable[[Integer[Array, "..."]], Float[Array, "..."]]


def _highest(blocks: Float[Array, "*stack K R F"]) -> Float[Array, "*stack K 1 F"]:
  return jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)


def _signed_eighth(blocks: Float[Array, "*stack K R F"]) -> Float[Array, "*stack K 1 F"]:
  """Returns the scale at which the number farthest from 0, of either sign, is the level -8: all 16 are in use."""
  highest, lowest = jnp.max(blocks, axis=-2, keepdims=True), jnp.min(blocks, axis=-2, keepdims=True)
  return (jnp.where(highest > -lowest, highest, lowest) / -8).astype(jnp.bfloat16)


def _encode_nf4(ratios: Float[Array, "..."]) -> Integer[Array, "..."]:
  """Returns the number of the nearest level."""
  return sum((ratios > bound).astype(jnp.uint8) for bound in _NF4_BOUNDS.astype(np.float32))


def _decode_nf4(codes: Integer[Array, "..."]) -> Float[Array, "..."]:
  """Returns the levels: looked up on CPU, elsewhere chosen bit by bit.

  The latter is as fast on CPU by itself, and in a loop has XLA keep levels as whole arrays outside of it.
  """
  if target_platform() == "cpu":
    return jnp.array(NF4_LEVELS, jnp.float32).at[codes].get(mode="promise_in_bounds")

  def choose(levels: tuple[float, ...], bit: int) -> Any:
    if len(levels) == 1:
      return jnp.float32(levels[0])
    half = len(levels) // 2
    is_upper = (codes & (1 << bit)) != 0
    return jnp.where(is_upper, choose(levels[half:], bit - 1), choose(levels[:half], bit - 1))

  return choose(NF4_LEVELS, 3)


FORMATS: dict[str, Format] = {
  "int8": Format(
    8,
    scale=lambda blocks: _highest(blocks) * (1 / 127),
    encode=lambda ratios: jnp.clip(jnp.round(ratios), -127, 127).astype(jnp.int8),
    decode=lambda codes: codes.astype(jnp.float32),
  ),
  "int4": Format(
    4,
    scale=_signed_eighth,
    encode=lambda ratios: (jnp.clip(jnp.round(ratios), -8, 7) + 8).astype(jnp.uint8),
    decode=lambda codes: codes.astype(jnp.float32) - 8,
  ),
  "nf4": Format(
    4,
    scale=lambda blocks: _highest(blocks).astype(jnp.bfloat16),
    encode=_encode_nf4,
    decode=_decode_nf4,
  ),
}


def quantize(kernel: Float[Array, "*stack D F"], format: str) -> Quantized:
  """Returns the kernel in the bits of `format`, one of FORMATS.

  A block of 4-bit numbers has 64 rows or, where these do not divide D, the largest even number below that does. Zeros
  stay zeros. A block with a number that is not finite is NaN as a whole.

  Raises:
    ConfigError: a 4-bit format and no such block of at least 8 rows.
  """
  form = FORMATS[format]
  *stack, D, F = kernel.shape
  rows = D if form.bits == 8 else _block_rows(D, format)
  blocks = kernel.astype(jnp.float32).reshape(*stack, D // rows, rows, F)
  scales = form.scale(blocks)
  is_finite = jnp.all(jnp.isfinite(blocks), axis=-2, keepdims=True)  # a maximum may pass over NaN
  scales = jnp.where(is_finite, scales, jnp.nan)
  codes = form.encode(blocks / jnp.where(scales == 0, 1, scales).astype(jnp.float32))
  if form.bits == 4:
    codes = codes[..., : rows // 2, :] | codes[..., rows // 2 :, :] << 4
  return Quantized(codes.reshape(*stack, -1, F), jnp.squeeze(scales, axis=-2), format)


def _block_rows(num_rows: int, format: str) -> int:
  """Returns the rows of a block of a 4-bit format."""
  fitting = [rows for rows in range(_FEWEST_BLOCK_ROWS, _BLOCK_ROWS + 1, 2) if num_rows % rows == 0]
  if not fitting:
    raise ConfigError(
      f"lora.base_dtype={format!r} with a matrix of {num_rows} rows, which no even number from {_FEWEST_BLOCK_ROWS} to "
      f"{_BLOCK_ROWS} divides; choose lora.base_dtype='int8'"
    )
  return fitting[-1]


def dequantize(quantized: Quantized, dtype: Any) -> Float[Array, "*stack D F"]:
  """Returns the kernel that `quantized` stands for, multiplied in float32 and then rounded to `dtype`.

  On CPU it takes about as long as rounding a float32 kernel to bfloat16 does.
  """
  form = FORMATS[quantized.format]
  *stack, K, F = quantized.scales.shape
  codes = quantized.values.reshape(*stack, K, 1, -1, F)
  if form.bits == 4:  # shifted side by side: halves that were joined would be copied
    codes = codes >> jnp.array([0, 4], jnp.uint8)[:, None, None] & 15
  scales = quantized.scales.astype(jnp.float32)[..., None, None, :]
  return (form.decode(codes) * scales).astype(dtype).reshape(*stack, -1, F)


def in_dtype(kernel: Float[Array, "*stack D F"] | Quantized, dtype: Any) -> Float[Array, "*stack D F"]:
  """Returns the kernel in `dtype`, however it is kept."""
  return dequantize(kernel, dtype) if isinstance(kernel, Quantized) else kernel.astype(dtype)


def num_bytes(quantized: Quantized) -> int:
  """Returns what values and scales take together."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(quantized))


def quantization_error(kernel: Float[Array, "*stack D F"], quantized: Quantized) -> Float[Array, ""]:
  """Returns the root mean square of what was lost over that of the kernel; 0 of a kernel of zeros."""
  kernel = kernel.astype(jnp.float32)
  lost = jnp.sum(jnp.square(kernel - dequantize(quantized, jnp.float32)))
  whole = jnp.sum(jnp.square(kernel))
  return jnp.sqrt(lost / jnp.where(whole == 0, 1, whole))
