"""Cross-entropy that never holds [B, T, V]: logits of a few columns of time at once, gradients taken on the spot.

The loss is a weighted sum, so its gradient with respect to the logits is known as soon as they are: the forward pass
of a differentiated call forms the gradients of `hidden` and `table` chunk by chunk, and no logit is computed twice.
The vocabulary comes first, which is the order in which both products with the table run fastest on CPU.

On CPU a chunk is worked off block by block of the vocabulary: products of this size run several times as fast as those
of a whole one, and what is made of their results is made in the cache. Powers are relative to the highest logit so far.

Source: arXiv:1805.02867 (highest logit and normaliser over blocks), arXiv:1512.00567 section 7 (label smoothing),
arXiv:2204.02311 section 5 (z-loss).
Letters: B batch  T length  t time of a chunk  D embed  V vocab  N blocks  v tokens of a block.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from ultrathink_jax.kernels.bits import loaded, stored
from ultrathink_jax.kernels.cross_entropy import TokenLosses
from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.matmul import transposed_product
from ultrathink_jax.kernels.per_token import sum_over_tokens
from ultrathink_jax.kernels.soft_cap import Cap, soft_cap, through_soft_cap
from ultrathink_jax.platform import is_one_cpu, target_platform

_MAX_CHUNK_LOGITS = 2**25  # of a device: 128 MiB of float32
_GPU_CHUNKS = 8  # times as many on a GPU: with few rows a chunk, the sum of the table's gradient is all memory traffic
_BLOCK_TOKENS = 1024  # of the vocabulary
_LOWEST = -1e30  # finite, so that differences stay finite


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
  """Returns the largest divisor of `length` whose logits stay within the budget of the devices that share them.

  It is at least 1 and, where devices split the length, a multiple of their number: each has an equal part of a chunk.
  """
  sizes, parts = _mesh_sizes(), _parts(length)
  sharing = math.prod(size for axis, size in sizes.items() if axis != "pipe")
  most = max(
    parts, _MAX_CHUNK_LOGITS * sharing * (_GPU_CHUNKS if target_platform() == "gpu" else 1) // (batch * vocab_size)
  )
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
  return token_loss_chunked(hidden, table, targets, weights, cap)[0]


def token_loss_chunked(
  hidden: Float[Array, "B T D"],
  table: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  cap: Cap = None,
  smoothing: float = 0.0,
  z_weight: float = 0.0,
) -> tuple[Float[Array, ""], TokenLosses]:
  """Returns the total of what `token_losses` returns, differentiable in `hidden` and `table`, and the sums themselves.

  The sums have no gradient.
  """
  B, T, _ = hidden.shape
  mix = _Mix(smoothing, z_weight)
  total, losses = _loss(hidden, table, targets, weights, cap, chunk_length(B, T, table.shape[0]), mix)
  return total, jax.lax.stop_gradient(losses)


def sample_tokens(
  hidden: Float[Array, "B T D"], table: Float[Array, "V D"], cap: Cap, key: Key[Array, ""]
) -> Int[Array, "B T"]:
  """Returns for each position a token drawn from the softmax of its logits, without gradient."""
  hidden, table = jax.lax.stop_gradient((hidden, table))
  chunks = _split(hidden, chunk_length(*hidden.shape[:2], table.shape[0]))
  table = table.astype(hidden.dtype)

  def draw(inputs):
    hidden, key = inputs
    logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    return jax.random.categorical(key, soft_cap(logits, cap)).astype(jnp.int32)

  return _join(jax.lax.map(draw, (chunks, jax.random.split(key, chunks.shape[0]))))


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
  has_overlap: bool

  def rounded(self, table: Float[Array, "V D"], dtype: Any) -> Float[Array, "V D"]:
    """Returns the table in `dtype` where it is one block; else as it is, since XLA on CPU would keep float32 of it."""
    return table.astype(dtype) if self.size == table.shape[0] else table

  def rows(self, table: Float[Array, "V D"], start: Int[Array, ""], dtype: Any) -> Float[Array, "v D"]:
    """Returns the rows of a block in `dtype`."""
    rows = table if self.size == table.shape[0] else jax.lax.dynamic_slice_in_dim(table, start, self.size)
    return rows.astype(dtype)

  def own(self, start: Int[Array, ""], first: Int[Array, ""], numbers: Float[Array, "v B t"]) -> Float[Array, "v B t"]:
    """Returns the numbers of the block of tokens from `start` on, 0 for tokens that belong to the block before."""
    return jnp.where(self._is_own(start, first)[:, None, None], numbers, 0) if self.has_overlap else numbers

  def sum_of_own(
    self, start: Int[Array, ""], first: Int[Array, ""], numbers: Float[Array, "v B t"]
  ) -> Float[Array, "B t"]:
    """Returns the sum of those numbers over the tokens."""
    return sum_over_tokens(numbers, 1, weights=self._is_own(start, first) if self.has_overlap else None)

  def _is_own(self, start: Int[Array, ""], first: Int[Array, ""]) -> Bool[Array, " v"]:
    return start + jnp.arange(self.size) >= first


def _blocks(vocab_size: int) -> _Blocks:
  """Returns one block where products gain nothing from several, or where devices share the vocabulary."""
  size = vocab_size
  if is_one_cpu():
    number = -(-vocab_size // _BLOCK_TOKENS)
    size = min(vocab_size, -(-vocab_size // (16 * number)) * 16)
  firsts = jnp.arange(0, vocab_size, size)
  return _Blocks(size, jnp.minimum(firsts, vocab_size - size), firsts, vocab_size % size != 0)


class _Mix(NamedTuple):
  """What of the loss is not the cross-entropy with the targets. Where it is nothing, nothing is worked out for it."""

  smoothing: float
  z_weight: float


class _Softmax(NamedTuple):
  """Of the logits of a chunk: their highest, sum_v exp(logits - highest), those of the targets, and sum_v logits.

  The last are for label smoothing alone.
  """

  highest: Float[Array, "B t"]
  normalizer: Float[Array, "B t"]
  target_logits: Float[Array, "B t"]
  logit_sums: Float[Array, "B t"] | None

  @property
  def log_normalizer(self) -> Float[Array, "B t"]:
    return jnp.log(self.normalizer) + self.highest

  def losses(self, weights: Float[Array, "B t"], vocab_size: int, mix: _Mix) -> TokenLosses:
    return TokenLosses(
      jnp.sum(weights * (self.log_normalizer - self.target_logits)),
      jnp.sum(weights * (self.log_normalizer - self.logit_sums / vocab_size)) if mix.smoothing else None,
      jnp.sum(weights * jnp.square(self.log_normalizer)) if mix.z_weight else None,
    )


def _softmax(
  hidden, table, targets, cap, blocks: _Blocks, mix: _Mix, is_kept: bool
) -> tuple[_Softmax, tuple[Shaped[Array, "N v B t"], Float[Array, "N B t"]] | None]:
  """Returns the softmax and, if kept, what gradients are made of: each block's powers and what they are relative to.

  The powers have passed backward through the soft cap and have the dtype of `hidden`, as the gradients will. Label
  smoothing needs the logits themselves, and gets those.
  """

  columns = materialized(lambda hidden: jnp.moveaxis(hidden, -1, 0), hidden)  # once, and not for each block

  def read(softmax: _Softmax, block):
    start, first = block
    rows = blocks.rows(table, start, hidden.dtype)
    logits = soft_cap(jnp.einsum("vd,dbt->vbt", rows, columns, preferred_element_type=jnp.float32), cap)
    highest = jnp.maximum(softmax.highest, jnp.max(logits, axis=0))
    # One exponential a logit: gradients are made from these powers too.
    powers = jnp.exp(logits - highest)
    normalizer = softmax.normalizer * jnp.exp(softmax.highest - highest) + blocks.sum_of_own(start, first, powers)
    place = jnp.clip(targets - start, 0, blocks.size - 1)
    is_here = (targets >= start) & (targets < start + blocks.size)
    target_logits = jnp.take_along_axis(logits, place[None], axis=0)[0]
    target_logits = jnp.where(is_here, target_logits, softmax.target_logits)
    sums = softmax.logit_sums + blocks.sum_of_own(start, first, logits) if mix.smoothing else None
    powers = through_soft_cap(blocks.own(start, first, powers), logits, cap)
    kept = logits if mix.smoothing else stored(powers.astype(hidden.dtype))
    return _Softmax(highest, normalizer, target_logits, sums), (kept, highest) if is_kept else None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  empty = _Softmax(zeros + _LOWEST, zeros, zeros, zeros if mix.smoothing else None)
  return jax.lax.scan(read, empty, (blocks.starts, blocks.firsts))


def _no_losses(mix: _Mix) -> TokenLosses:
  zero = jnp.float32(0)
  return TokenLosses(zero, zero if mix.smoothing else None, zero if mix.z_weight else None)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _loss(hidden, table, targets, weights, cap, chunk: int, mix: _Mix):
  V = table.shape[0]
  blocks = _blocks(V)
  table = blocks.rounded(table, hidden.dtype)

  def add(losses, inputs):
    hidden, targets, weights = inputs
    new = _softmax(hidden, table, targets, cap, blocks, mix, is_kept=False)[0].losses(weights, V, mix)
    return jax.tree.map(jnp.add, losses, new), None

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  losses = jax.lax.scan(add, _no_losses(mix), chunks)[0]
  return losses.total(*mix), losses


def _loss_forward(hidden, table, targets, weights, cap, chunk: int, mix: _Mix):
  V = table.shape[0]
  blocks = _blocks(V)
  rounded = blocks.rounded(table, hidden.dtype)

  def add(carry, inputs):
    losses, table_gradient = carry
    hidden, targets, weights = inputs
    softmax, kept = _softmax(hidden, rounded, targets, cap, blocks, mix, is_kept=True)
    gradient_of = _logit_gradients(softmax, weights, targets, cap, V, mix)

    def add_block(gradients, block):
      table_gradient, hidden_gradient = gradients
      start, first, kept, highest = block
      gradient = gradient_of(start + jnp.arange(blocks.size), first, kept, highest).astype(hidden.dtype)
      hidden_gradient += transposed_product(blocks.rows(rounded, start, hidden.dtype), gradient)
      of_rows = jnp.einsum("vbt,btd->vd", gradient, hidden, preferred_element_type=jnp.float32)
      of_rows += blocks.rows(table_gradient, start, jnp.float32)
      if blocks.size < V:
        of_rows = jax.lax.dynamic_update_slice_in_dim(table_gradient, of_rows, start, 0)
      return (of_rows, hidden_gradient), None

    zeros = jnp.zeros((hidden.shape[-1], *targets.shape), jnp.float32)
    per_block = (blocks.starts, blocks.firsts, *kept)
    (table_gradient, hidden_gradient), _ = jax.lax.scan(add_block, (table_gradient, zeros), per_block)
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, -1).astype(hidden.dtype)
    losses = jax.tree.map(jnp.add, losses, softmax.losses(weights, V, mix))
    return (losses, table_gradient), hidden_gradient

  chunks = tuple(_split(array, chunk) for array in (hidden, targets, weights))
  start = (_no_losses(mix), jnp.zeros(table.shape, jnp.float32))
  (losses, table_gradient), hidden_gradient = jax.lax.scan(add, start, chunks)
  return (losses.total(*mix), losses), (_join(hidden_gradient), table_gradient.astype(table.dtype))


def _logit_gradients(softmax: _Softmax, weights, targets, cap, vocab_size: int, mix: _Mix):
  """Returns (tokens [v] of a block, the first that belongs to it, what was kept of it) -> [v, B, t].

  It is the gradient with respect to the logits before the cap:
  weight (probability (1 + 2 z_weight log normaliser) - (1 - smoothing) [is target] - smoothing / V).
  """
  scale = weights / softmax.normalizer
  even = mix.smoothing / vocab_size
  # The target's own: the difference to 1 is taken first, which is small for a token that is almost sure.
  power = jnp.exp(softmax.target_logits - softmax.highest)
  at_target, power_scale = power - softmax.normalizer, scale
  if mix.z_weight:
    more = 2 * mix.z_weight * softmax.log_normalizer
    at_target, power_scale = at_target + power * more, scale * (1 + more)
  if mix.smoothing:
    at_target += (mix.smoothing - even) * softmax.normalizer
  at_target = scale * through_soft_cap(at_target, softmax.target_logits, cap)

  def gradient_of(tokens, first, kept, highest):
    # A comparison rather than a scatter: it fuses with its neighbours and stays local where V is sharded.
    is_target = tokens[:, None, None] == jnp.where(targets < first, -1, targets)
    if mix.smoothing:
      gradient = through_soft_cap(jnp.exp(kept - softmax.highest) * power_scale - even * weights, kept, cap)
      gradient = jnp.where((tokens >= first)[:, None, None], gradient, 0)
    else:
      gradient = loaded(kept).astype(jnp.float32) * (power_scale * jnp.exp(highest - softmax.highest))
    return jnp.where(is_target, at_target, gradient)

  return gradient_of


def _loss_backward(chunk: int, mix: _Mix, residuals, gradients):
  hidden_gradient, table_gradient = residuals
  scale = gradients[0]
  return hidden_gradient * scale.astype(hidden_gradient.dtype), table_gradient * scale, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)
