"""Cross-entropy that never holds [B, T, V]: logits of a few columns of time at once, gradients taken on the spot.

The loss is a weighted sum, so its gradient with respect to the logits is known as soon as they are: the forward pass
of a differentiated call forms the gradients of `hidden` and `table` chunk by chunk, and no logit is computed twice.
The vocabulary comes first, which is the order in which both products with the table run fastest on CPU.

On CPU a chunk is worked off block by block of the vocabulary: products of this size run several times as fast as those
of a whole one, and what is made of their results is made in the cache. Powers are relative to the highest logit so far.

Source: arXiv:1805.02867 (highest logit and normaliser over blocks).
Letters: B batch  T length  t time of a chunk  D embed  V vocab  N blocks  v tokens of a block.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.matmul import transposed_product
from ultrathink_jax.kernels.soft_cap import Cap, soft_cap, through_soft_cap
from ultrathink_jax.platform import target_platform

_MAX_CHUNK_LOGITS = 2**25  # of a device: 128 MiB of float32
_BLOCK_TOKENS = 1024  # of the vocabulary
_LOWEST = -1e30  # finite, so that differences stay finite


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
  """Returns the largest divisor of `length` whose logits stay within the budget of the devices that share them.

  It is at least 1 and, where devices split the length, a multiple of their number: each has an equal part of a chunk.
  """
  sizes, parts = _mesh_sizes(), _parts(length)
  sharing = math.prod(size for axis, size in sizes.items() if axis != "pipe")
  most = max(parts, _MAX_CHUNK_LOGITS * sharing // (batch * vocab_size))
  return max(size for size in range(parts, length + 1, parts) if length % size == 0 and size <= most)


def _mesh_sizes() -> dict[str, int]:
  mesh = jax.sharding.get_abstract_mesh()
  return {} if mesh.empty else dict(mesh.shape)


def _parts(length: int) -> int:
  """Returns how many devices of the context axis split the length."""
  parts = _mesh_sizes().get("context", 1)
  return 1 if length % parts else parts


def cross_entropy_chunked(
  hidden: Float[Array, "B T D"],
  table: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  cap: Cap = None,
) -> Float[Array, ""]:
  """Returns what `cross_entropy` does, differentiable in `hidden` and `table`."""
  B, T, _ = hidden.shape
  return _loss(hidden, table, targets, weights, cap, chunk_length(B, T, table.shape[0]))


def _split(array: Array, chunk: int) -> Array:
  """Returns [B, T, ...] as [T / chunk, B, chunk, ...]; each chunk has an equal share of every device's time."""
  B, T = array.shape[:2]
  parts = _parts(T)
  by_part = array.reshape(B, parts, T // chunk, chunk // parts, *array.shape[2:])
  return jnp.moveaxis(by_part, 2, 0).reshape(T // chunk, B, chunk, *array.shape[2:])


def _join(chunks: Array) -> Array:
  """Returns what `_split` was given."""
  number, B, chunk = chunks.shape[:3]
  parts = _parts(number * chunk)
  by_part = chunks.reshape(number, B, parts, chunk // parts, *chunks.shape[3:])
  return jnp.moveaxis(by_part, 0, 2).reshape(B, number * chunk, *chunks.shape[3:])


class _Blocks(NamedTuple):
  """The vocabulary in N blocks of `size` tokens: the last begins early enough to be whole, and overlaps the one before.

  Tokens from `starts` up to `firsts` belong to that one.
  """

  size: int
  starts: Int[Array, " N"]
  firsts: Int[Array, " N"]


def _blocks(vocab_size: int) -> _Blocks:
  """Returns one block where products gain nothing from several, or where devices share the vocabulary."""
  size = vocab_size
  if target_platform() == "cpu" and math.prod(_mesh_sizes().values()) == 1:
    number = -(-vocab_size // _BLOCK_TOKENS)
    size = min(vocab_size, -(-vocab_size // (16 * number)) * 16)
  firsts = jnp.arange(0, vocab_size, size)
  return _Blocks(size, jnp.minimum(firsts, vocab_size - size), firsts)


def _rows(table: Float[Array, "V D"], start: Int[Array, ""], size: int) -> Float[Array, "v D"]:
  return table if size == table.shape[0] else jax.lax.dynamic_slice_in_dim(table, start, size)


class _Softmax(NamedTuple):
  """Of the logits of a chunk: their highest, sum_v exp(logits - highest), and those of the targets."""

  highest: Float[Array, "B t"]
  normalizer: Float[Array, "B t"]
  target_logits: Float[Array, "B t"]

  def loss(self, weights: Float[Array, "B t"]) -> Float[Array, ""]:
    return jnp.sum(weights * (jnp.log(self.normalizer) + self.highest - self.target_logits))


def _softmax(
  hidden, table, targets, cap, blocks: _Blocks, is_kept: bool
) -> tuple[_Softmax, tuple[Float[Array, "N v B t"], Float[Array, "N B t"]] | None]:
  """Returns the softmax and, if kept, what gradients are made of: each block's powers and what they are relative to.

  The powers have passed backward through the soft cap. They are float32 at any compute dtype: XLA on CPU copies the
  whole array to put a block of bfloat16 into it.
  """

  def read(softmax: _Softmax, block):
    start, first = block
    logits = jnp.einsum("vd,btd->vbt", _rows(table, start, blocks.size), hidden, preferred_element_type=jnp.float32)
    logits = soft_cap(logits, cap)
    highest = jnp.maximum(softmax.highest, jnp.max(logits, axis=0))
    # One exponential a logit: gradients are made from these powers too.
    is_own = start + jnp.arange(blocks.size) >= first
    powers = jnp.where(is_own[:, None, None], jnp.exp(logits - highest), 0)
    normalizer = softmax.normalizer * jnp.exp(softmax.highest - highest) + jnp.sum(powers, axis=0)
    place = jnp.clip(targets - start, 0, blocks.size - 1)
    is_here = (targets >= start) & (targets < start + blocks.size)
    target_logits = jnp.take_along_axis(logits, place[None], axis=0)[0]
    softmax = _Softmax(highest, normalizer, jnp.where(is_here, target_logits, softmax.target_logits))
    return softmax, (through_soft_cap(powers, logits, cap), highest) if is_kept else None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  return jax.lax.scan(read, _Softmax(zeros + _LOWEST, zeros, zeros), (blocks.starts, blocks.firsts))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(hidden, table, targets, weights, cap, chunk: int):
  table, blocks = table.astype(hidden.dtype), _blocks(table.shape[0])

  def add(total, inputs):
    hidden, targets, weights = inputs
    return total + _softmax(hidden, table, targets, cap, blocks, is_kept=False)[0].loss(weights), None

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  return jax.lax.scan(add, jnp.float32(0), chunks)[0]


def _loss_forward(hidden, table, targets, weights, cap, chunk: int):
  table_in_dtype, blocks = table.astype(hidden.dtype), _blocks(table.shape[0])

  def add(carry, inputs):
    total, table_gradient = carry
    hidden, targets, weights = inputs
    softmax, kept = _softmax(hidden, table_in_dtype, targets, cap, blocks, is_kept=True)
    scale = weights / softmax.normalizer
    at_target = jnp.exp(softmax.target_logits - softmax.highest) - softmax.normalizer
    at_target = scale * through_soft_cap(at_target, softmax.target_logits, cap)

    def add_block(gradients, block):
      table_gradient, hidden_gradient = gradients
      start, first, powers, highest = block
      # A comparison rather than a scatter: it fuses with its neighbours and stays local where V is sharded.
      is_target = (start + jnp.arange(blocks.size))[:, None, None] == jnp.where(targets < first, -1, targets)
      gradient = powers * (scale * jnp.exp(highest - softmax.highest))
      gradient = jnp.where(is_target, at_target, gradient).astype(hidden.dtype)
      hidden_gradient += transposed_product(_rows(table_in_dtype, start, blocks.size), gradient)
      of_rows = jnp.einsum("vbt,btd->vd", gradient, hidden, preferred_element_type=jnp.float32)
      of_rows += _rows(table_gradient, start, blocks.size)
      if blocks.size < table.shape[0]:
        of_rows = jax.lax.dynamic_update_slice_in_dim(table_gradient, of_rows, start, 0)
      return (of_rows, hidden_gradient), None

    zeros = jnp.zeros((hidden.shape[-1], *targets.shape), jnp.float32)
    per_block = (blocks.starts, blocks.firsts, *kept)
    (table_gradient, hidden_gradient), _ = jax.lax.scan(add_block, (table_gradient, zeros), per_block)
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, -1).astype(hidden.dtype)
    return (total + softmax.loss(weights), table_gradient), hidden_gradient

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  start = (jnp.float32(0), jnp.zeros(table.shape, jnp.float32))
  (total, table_gradient), hidden_gradient = jax.lax.scan(add, start, chunks)
  return total, (_join(hidden_gradient), table_gradient.astype(table.dtype))


def _loss_backward(chunk: int, residuals, scale):
  hidden_gradient, table_gradient = residuals
  return hidden_gradient * scale.astype(hidden_gradient.dtype), table_gradient * scale, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)
