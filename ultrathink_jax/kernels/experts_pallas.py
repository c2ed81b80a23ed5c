"""Mixture of experts whose three products, and all their gradients, are grouped matrix products in Pallas.

Rows lie sorted by expert, each expert's padded to whole blocks, so that a tile of the product reads one expert. On GPU
(and in the interpreter) the kernels are here; on TPU they are the grouped products that ship with JAX.

Source: arXiv:2211.15841. Letters: T tokens of the whole batch  K choices of a token  E experts  D in  F out  M blocks
R rows of a block  S = M R slots.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.activation import activate
from ultrathink_jax.kernels.experts import Bank, rounded
from ultrathink_jax.kernels.experts_sorted import combine, dispatch, plan_rows
from ultrathink_jax.kernels.names import KERNEL_OUTPUT
from ultrathink_jax.kernels.pallas_call import on_platform, pallas_call, power_of_two

BLOCK_ROWS = 128
_TILE = 128  # of the dim that a product makes, and of D where both dims are made
_WIDE_TILE = 256  # the same of 16-bit numbers where it divides the dim: less is read for each operation
_STEP = 64  # of the dim that is summed over; half of it for float32
_NUM_WARPS = 8
_NUM_STAGES = 3
_TPU_ROWS = 512  # of a tile; the number of all rows is a multiple of it
_TPU_TILE = 1024


def experts_pallas(
  x: Float[Array, "T D"],
  choices: Int[Array, "T K"],
  gates: Float[Array, "T K"],
  gate_kernel: Float[Array, "E D F"] | Bank | None,
  up_kernel: Float[Array, "E D F"] | Bank,
  down_kernel: Float[Array, "E F D"] | Bank,
  capacity: int | None = None,
  activation: str = "swiglu",
) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
  """Returns what `experts` does."""
  arrays = (x, choices, gates, gate_kernel, up_kernel, down_kernel)
  return experts_by_product(grouped_product, *arrays, capacity, activation)


def experts_by_product(
  product: Callable[[Array, Array, Array], Array],
  x: Float[Array, "T D"],
  choices: Int[Array, "T K"],
  gates: Float[Array, "T K"],
  gate_kernel: Float[Array, "E D F"] | Bank | None,
  up_kernel: Float[Array, "E D F"] | Bank,
  down_kernel: Float[Array, "E F D"] | Bank,
  capacity: int | None,
  activation: str,
) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
  """Returns what `experts` does, by product(rows [S, D], kernel [E, D, F], num_blocks [E]) -> [S, F].

  Rows come in blocks of `BLOCK_ROWS`, of which expert e has num_blocks[e], the last one all that are left over.
  """
  gate_kernel, up_kernel, down_kernel = rounded(x.dtype, gate_kernel, up_kernel, down_kernel)
  E = up_kernel.shape[0]
  counts = jnp.sum(jax.nn.one_hot(choices.reshape(-1), E, dtype=jnp.int32), axis=0)
  capacity = choices.size if capacity is None else min(capacity, choices.size)
  num_blocks = -(-jnp.minimum(counts, capacity) // BLOCK_ROWS)
  most_blocks = min(choices.size // BLOCK_ROWS + E, E * -(-capacity // BLOCK_ROWS))
  most_blocks += -most_blocks % (_TPU_ROWS // BLOCK_ROWS)
  first_slot = (jnp.cumsum(num_blocks) - num_blocks) * BLOCK_ROWS
  plan = plan_rows(choices, first_slot, counts, capacity, most_blocks * BLOCK_ROWS)
  num_blocks = num_blocks.at[-1].add(most_blocks - jnp.sum(num_blocks))
  rows = dispatch(x, plan)
  multiply = lambda rows, kernel: checkpoint_name(product(rows, kernel, num_blocks), KERNEL_OUTPUT)
  gate = None if gate_kernel is None else multiply(rows, gate_kernel)
  hidden = activate(activation, gate, multiply(rows, up_kernel))
  y = combine(multiply(hidden, down_kernel), gates.astype(x.dtype), plan)
  return y, plan.slot_of_choice < rows.shape[0]


@jax.custom_vjp
def grouped_product(
  rows: Float[Array, "S D"], kernel: Float[Array, "E D F"], num_blocks: Int[Array, " E"]
) -> Float[Array, "S F"]:
  """Returns each row times the kernel of its expert; expert e has the next num_blocks[e] blocks of rows."""
  return on_platform(partial(_multiply, False), rows, kernel, num_blocks)


def _grouped_forward(rows, kernel, num_blocks):
  return grouped_product(rows, kernel, num_blocks), (rows, kernel, num_blocks)


def _grouped_backward(residuals, gradient):
  rows, kernel, num_blocks = residuals
  rows_gradient = on_platform(partial(_multiply, True), gradient, kernel, num_blocks)
  return rows_gradient, on_platform(_sum_outer_products, rows, gradient, num_blocks), None


grouped_product.defvjp(_grouped_forward, _grouped_backward)


def _multiply(is_transposed: bool, platform: str, rows, kernel, num_blocks):
  """Returns each row times its kernel or, to carry gradients back, times the transpose of it."""
  width = kernel.shape[1 if is_transposed else 2]
  if platform == "tpu":
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiling = _tpu_tiling(rows.shape[1], width)
    return gmm(rows, kernel, num_blocks * BLOCK_ROWS, rows.dtype, tiling, transpose_rhs=is_transposed)
  S = rows.shape[0]
  depth_tile, depth = _tile(rows.shape[1], _step(rows.dtype))
  tile, padded_width = _tile(width, _widest(width, rows.dtype))
  rows = jnp.pad(rows, ((0, 0), (0, depth - rows.shape[1])))
  dims = (padded_width, depth) if is_transposed else (depth, padded_width)
  kernel = jnp.pad(kernel, ((0, 0), *((0, new - old) for new, old in zip(dims, kernel.shape[1:], strict=True))))
  E, M = kernel.shape[0], S // BLOCK_ROWS
  of_kernel = (
    pl.BlockSpec((E, tile, depth), lambda f, m: (0, f, 0))
    if is_transposed
    else pl.BlockSpec((E, depth, tile), lambda f, m: (0, 0, f))
  )
  expert_of_block = jnp.searchsorted(jnp.cumsum(num_blocks), jnp.arange(M), side="right").astype(jnp.int32)
  out = pallas_call(
    partial(_multiply_kernel, is_transposed, depth_tile),
    platform,
    grid=(padded_width // tile, M),
    in_specs=[
      pl.BlockSpec((M,), lambda f, m: (0,)),
      pl.BlockSpec((BLOCK_ROWS, depth), lambda f, m: (m, 0)),
      of_kernel,
    ],
    out_specs=pl.BlockSpec((BLOCK_ROWS, tile), lambda f, m: (m, f)),
    out_shape=jax.ShapeDtypeStruct((S, padded_width), rows.dtype),
    num_warps=_NUM_WARPS,
    num_stages=_NUM_STAGES,
  )(expert_of_block, rows, kernel)
  return out[:, :width]


def _multiply_kernel(is_transposed: bool, depth_tile: int, expert_of_block, rows, kernel, out):
  expert = expert_of_block[pl.program_id(1)]
  axes = ((1,), (1,)) if is_transposed else ((1,), (0,))

  def step(i, total):
    part = pl.ds(pl.multiple_of(i * depth_tile, depth_tile), depth_tile)
    weights = kernel[expert, :, part] if is_transposed else kernel[expert, part, :]
    return total + jax.lax.dot_general(rows[:, part], weights, (axes, ((), ())), preferred_element_type=jnp.float32)

  zeros = jnp.zeros(out.shape, jnp.float32)
  out[...] = jax.lax.fori_loop(0, rows.shape[1] // depth_tile, step, zeros).astype(out.dtype)


def _sum_outer_products(platform: str, rows, gradient, num_blocks):
  """Returns each expert's rows^T gradient [E, D, F], the gradient of its kernel."""
  D, F = rows.shape[1], gradient.shape[1]
  if platform == "tpu":
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    return tgmm(rows.T, gradient, num_blocks * BLOCK_ROWS, rows.dtype, _tpu_tiling(D, F))
  (tile_in, padded_in), (tile_out, padded_out) = _tile(D, _TILE), _tile(F, _widest(F, rows.dtype))
  rows = jnp.pad(rows, ((0, 0), (0, padded_in - D)))
  gradient = jnp.pad(gradient, ((0, 0), (0, padded_out - F)))
  S, E = rows.shape[0], num_blocks.shape[0]
  end = jnp.cumsum(num_blocks, dtype=jnp.int32)
  out = pallas_call(
    partial(_sum_outer_products_kernel, _step(rows.dtype)),
    platform,
    grid=(padded_out // tile_out, padded_in // tile_in, E),
    in_specs=[
      pl.BlockSpec((E + 1,), lambda f, d, e: (0,)),
      pl.BlockSpec((S, tile_in), lambda f, d, e: (0, d)),
      pl.BlockSpec((S, tile_out), lambda f, d, e: (0, f)),
    ],
    out_specs=pl.BlockSpec((None, tile_in, tile_out), lambda f, d, e: (e, d, f)),
    out_shape=jax.ShapeDtypeStruct((E, padded_in, padded_out), rows.dtype),
    num_warps=_NUM_WARPS,
    num_stages=_NUM_STAGES,
  )(jnp.pad(end, (1, 0)), rows, gradient)
  return out[:, :D, :F]


def _sum_outer_products_kernel(step_rows: int, first_block, rows, gradient, out):
  expert = pl.program_id(2)
  steps_of_block = BLOCK_ROWS // step_rows

  def step(i, total):
    part = pl.ds(pl.multiple_of(i * step_rows, step_rows), step_rows)
    dims = (((0,), (0,)), ((), ()))
    return total + jax.lax.dot_general(rows[part, :], gradient[part, :], dims, preferred_element_type=jnp.float32)

  bounds = (first_block[expert] * steps_of_block, first_block[expert + 1] * steps_of_block)
  out[...] = jax.lax.fori_loop(*bounds, step, jnp.zeros(out.shape, jnp.float32)).astype(out.dtype)


def _step(dtype: jnp.dtype) -> int:
  return _STEP * 2 // max(2, dtype.itemsize)


def _widest(width: int, dtype: jnp.dtype) -> int:
  return _WIDE_TILE if width % _WIDE_TILE == 0 and dtype.itemsize == 2 else _TILE


def _tile(size: int, largest: int) -> tuple[int, int]:
  """Returns a tile that Triton multiplies and the size padded to a multiple of it."""
  tile = min(largest, power_of_two(size))
  return tile, -(-size // tile) * tile


def _tpu_tiling(depth: int, width: int) -> tuple[int, int, int]:
  """Returns tiles of rows, depth and width: as few as fit on chip, and of nearly equal size."""
  even = lambda size: size if size <= _TPU_TILE else -(-size // -(-size // _TPU_TILE) // 128) * 128
  return _TPU_ROWS, even(depth), even(width)
