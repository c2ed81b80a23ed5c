import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels.quantized import (
  FORMATS,
  NF4_LEVELS,
  Quantized,
  dequantize,
  num_bytes,
  quantization_error,
  quantize,
)
from ultrathink_jax.platform import compiling_for

KERNEL = jax.random.normal(jax.random.key(0), (2, 3, 128, 40))
STANDARD_ERROR = {"int8": 0.0075, "int4": 0.096, "nf4": 0.096}  # of normal numbers
SHARE_OF_FLOAT32 = {"int8": 0.26, "int4": 0.133, "nf4": 0.133}  # of 128 rows
LEVELS = {"int8": np.arange(-127, 128), "int4": np.arange(-8, 8), "nf4": np.array(NF4_LEVELS)}

every_format = pytest.mark.parametrize("format", FORMATS)


def oracle(kernel, format):
  """Returns what a kernel [D, F] becomes, column by column, and the level of each number."""
  levels, out, chosen = LEVELS[format], np.zeros(kernel.shape), np.zeros(kernel.shape)
  D, F = kernel.shape
  rows = D if format == "int8" else max(r for r in range(2, 65, 2) if D % r == 0)
  for first, column in np.ndindex(D // rows, F):
    block = kernel[first * rows : (first + 1) * rows, column]
    farthest = block[np.argmax(np.abs(block))]
    scale = {"int8": abs(farthest) * np.float32(1 / 127), "int4": farthest / -8, "nf4": abs(farthest)}[format]
    scale = np.float32(scale if format == "int8" else jnp.bfloat16(scale))
    nearest = levels[np.argmin(np.abs(block[:, None] / (scale or 1) - levels), axis=1)]
    chosen[first * rows : (first + 1) * rows, column] = nearest
    out[first * rows : (first + 1) * rows, column] = np.float32(nearest) * scale
  return out, chosen


@every_format
@pytest.mark.parametrize("D", [128, 64, 96, 12])
def test_every_number_becomes_the_nearest_level_of_its_block(format, D):
  kernel = np.array(jax.random.normal(jax.random.key(D), (D, 9)))
  kernel[:, 3], kernel[:, 4] = 0.0, -2.5
  expected, chosen = oracle(kernel, format)
  quantized = quantize(jnp.asarray(kernel), format)
  np.testing.assert_array_equal(dequantize(quantized, jnp.float32), expected.astype(np.float32))
  assert set(LEVELS[format]) == set(np.unique(chosen)) or D < 64 or format == "int8"


@every_format
def test_every_level_survives(format):
  levels = np.tile(LEVELS[format], 4)[:, None].astype(np.float32) * np.float32([0.5, 4])
  levels = levels[: len(levels) // 64 * 64]
  np.testing.assert_array_equal(dequantize(quantize(jnp.asarray(levels), format), jnp.float32), levels)


def test_levels_chosen_bit_by_bit_are_those_looked_up():
  quantized = quantize(KERNEL, "nf4")
  with compiling_for("tpu"):
    chosen = dequantize(quantized, jnp.float32)
  np.testing.assert_array_equal(chosen, dequantize(quantized, jnp.float32))


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_two_numbers_share_a_byte_and_each_stands_in_its_own_half(format):
  quantized = quantize(KERNEL, format)
  assert quantized.values.dtype == jnp.uint8
  assert quantized.values.shape == (2, 3, 64, 40)
  low = dequantize(dataclasses.replace(quantized, values=quantized.values & 15), jnp.float32)
  high = dequantize(dataclasses.replace(quantized, values=quantized.values & 240), jnp.float32)
  both = dequantize(quantized, jnp.float32)
  is_first_half = (np.arange(128) % 64 < 32)[:, None]
  np.testing.assert_array_equal(np.where(is_first_half, low, high), both)


@every_format
def test_a_normal_kernel_loses_little_and_takes_little(format):
  quantized = quantize(KERNEL, format)
  assert 0.5 * STANDARD_ERROR[format] < float(quantization_error(KERNEL, quantized)) < STANDARD_ERROR[format]
  assert num_bytes(quantized) <= SHARE_OF_FLOAT32[format] * KERNEL.nbytes
  assert num_bytes(quantized) == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))


@every_format
def test_a_bank_of_stacks_equals_its_matrices_one_by_one(format):
  whole = dequantize(quantize(KERNEL, format), jnp.float32)
  for r, e in np.ndindex(2, 3):
    np.testing.assert_array_equal(dequantize(quantize(KERNEL[r, e], format), jnp.float32), whole[r, e])


@every_format
def test_scan_and_vmap_over_leading_dims_equal_the_whole(format):
  quantized = quantize(KERNEL, format)
  whole = dequantize(quantized, jnp.float32)
  one = lambda quantized: dequantize(quantized, jnp.float32)
  np.testing.assert_array_equal(jax.lax.scan(lambda _, q: (None, one(q)), None, quantized)[1], whole)
  np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(one)))(quantized), whole)


@every_format
def test_columns_and_rows_split_over_devices_equal_one_device(format):
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  quantized = quantize(KERNEL, format)
  whole = dequantize(quantized, jnp.float32)
  in_dim = None if format == "int8" else "fsdp"  # int8 has one scale for all rows
  of_values, of_scales = PartitionSpec(None, None, "fsdp", "tensor"), PartitionSpec(None, None, in_dim, "tensor")
  one = jax.shard_map(
    lambda q: dequantize(q, jnp.float32),
    mesh=mesh,
    in_specs=(Quantized(of_values, of_scales, format),),
    out_specs=of_values,
  )
  np.testing.assert_array_equal(jax.jit(one)(quantized), whole)


@every_format
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_asked_for_is_that_of_the_float32_numbers_rounded(format, dtype):
  quantized = quantize(KERNEL.astype(jnp.bfloat16), format)
  rounded = dequantize(quantized, dtype)
  assert rounded.dtype == dtype
  np.testing.assert_array_equal(rounded, dequantize(quantized, jnp.float32).astype(dtype))


@every_format
def test_zeros_stay_zeros_and_lose_nothing(format):
  zeros = jnp.zeros((64, 5))
  quantized = quantize(zeros, format)
  np.testing.assert_array_equal(dequantize(quantized, jnp.float32), zeros)
  assert float(quantization_error(zeros, quantized)) == 0


@every_format
@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_number_that_is_not_finite_makes_its_block_and_no_other_nan(format, value):
  kernel = KERNEL[0, 0].at[70, 7].set(value)
  is_nan = np.zeros(kernel.shape, bool)
  is_nan[0 if format == "int8" else 64 :, 7] = True
  np.testing.assert_array_equal(jnp.isnan(dequantize(quantize(kernel, format), jnp.float32)), is_nan)


@pytest.mark.parametrize("format", ["int4", "nf4"])
@pytest.mark.parametrize("D", [33, 2 * 67, 6])
def test_rows_without_a_block_that_pays_are_refused_in_4_bits(format, D):
  with pytest.raises(ConfigError, match=f"{format}.*{D} rows.*choose lora.base_dtype='int8'"):
    quantize(jnp.ones((D, 4)), format)
  assert dequantize(quantize(jnp.ones((D, 4)), "int8"), jnp.float32).shape == (D, 4)


def test_int4_reaches_the_end_on_the_side_of_the_farthest_number():
  kernel = jnp.zeros((64, 2)).at[5].set(jnp.array([4.0, -4.0])).at[6].set(jnp.array([-4.0, 4.0]) * 7 / 8)
  np.testing.assert_array_equal(dequantize(quantize(kernel, "int4"), jnp.float32), kernel)
