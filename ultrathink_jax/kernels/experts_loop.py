"""Mixture of experts, one expert after another, each over its own rows in chunks.

How many chunks an expert has is known only when the router has spoken, so these are loops of dynamic length: nothing is
padded but the last chunk, and hidden units stay in the cache. This is the fast form on CPU, where products of many rows
run at full speed and gathering a copy of the weights for every block of rows (experts_sorted) costs more than they do.

Gradients of gate and up kernels come from columns that were transposed once for all chunks, as XLA on CPU takes longer
for products whose left operand is transposed. That of the down kernel has hidden units on the left, which no two chunks
share: to transpose the gradient instead, [layers, experts, D, F], took a fortieth of a step.

Letters: T tokens of the whole batch  K choices of a token  E experts  D embed  F expert width  S sorted rows, one a
choice, and room for a chunk  R rows of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.activation import activate
from ultrathink_jax.kernels.experts import rank_in_expert, rounded
from ultrathink_jax.kernels.experts_sorted import experts_sorted
from ultrathink_jax.kernels.matmul import transposed_product

_CHUNK_ROWS = 512
_REST_ROWS = 64  # of the chunks that take what is left
_MAX_REST_CHUNKS = 3  # more than these cost more than one chunk that is not full
_FEW_TOKENS, _FEW_CHOICES = 32, 8


def _chunk_rows(num_choices: int, num_experts: int) -> tuple[int, int]:
  """Returns the rows of chunks and of rest chunks; fewer where experts have few."""
  rest = min(_REST_ROWS, max(1, num_choices // num_experts))
  return max(rest, min(_CHUNK_ROWS, num_choices // num_experts)), rest


class _Order(NamedTuple):
  """The choices sorted by expert; those of no expert come last."""

  choice_of_row: Int[Array, " TK"]
  row_of_choice: Int[Array, "T K"]
  counts: Int[Array, " E"]  # rows of each expert


def experts_loop(
  x: Float[Array, "T D"],
  choices: Int[Array, "T K"],
  gates: Float[Array, "T K"],
  gate_kernel: Float[Array, "E D F"] | None,
  up_kernel: Float[Array, "E D F"],
  down_kernel: Float[Array, "E F D"],
  capacity: int | None = None,
  activation: str = "swiglu",
) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
  """Returns what `experts` does.

  So few tokens that a product only reads weights, as in decoding, are not worth a loop: they take the chosen kernels,
  or, where they choose most of them, the whole bank at once.
  """
  E = up_kernel.shape[0]
  if capacity is None and choices.size <= min(E // 2, _FEW_CHOICES):
    return _chosen(x, choices, gates, gate_kernel, up_kernel, down_kernel, activation), choices < E
  if x.shape[0] <= _FEW_TOKENS:
    most = x.shape[0] if capacity is None else min(capacity, x.shape[0])
    return experts_sorted(x, choices, gates, gate_kernel, up_kernel, down_kernel, most, activation)
  is_computed = choices < E
  if capacity is not None:
    is_computed &= rank_in_expert(choices, E) < capacity
  flat = jnp.where(is_computed, choices, E).reshape(-1)
  choice_of_row = jnp.argsort(flat, stable=True)
  row_of_choice = jnp.zeros_like(flat).at[choice_of_row].set(jnp.arange(flat.size, dtype=flat.dtype))
  counts = jnp.sum(jax.nn.one_hot(flat, E, dtype=jnp.int32), axis=0)
  order = _Order(choice_of_row, row_of_choice.reshape(choices.shape), counts)
  kernels = (gate_kernel, up_kernel, down_kernel)
  return _mixture(activation, x, gates.astype(jnp.float32), kernels, order), is_computed


def _chosen(x, choices, gates, gate_kernel, up_kernel, down_kernel, activation: str) -> Float[Array, "T D"]:
  """Returns the mixture choice by choice, each with a copy of its expert's kernels."""
  gates = jnp.where(choices < up_kernel.shape[0], gates, 0).astype(x.dtype)

  def run(t: int, k: int) -> Float[Array, "1 D"]:
    kernel_of = lambda bank: jax.lax.dynamic_index_in_dim(bank, choices[t, k], keepdims=False).astype(x.dtype)
    inward = lambda bank: None if bank is None else x[t : t + 1] @ kernel_of(bank)
    return gates[t, k] * (activate(activation, inward(gate_kernel), inward(up_kernel)) @ kernel_of(down_kernel))

  T, K = choices.shape
  return jnp.concatenate([sum(run(t, k) for k in range(K)) for t in range(T)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(activation: str, x, gates, kernels, order: _Order) -> Float[Array, "T D"]:
  return _forward(activation, x, gates, kernels, order)[0]


def _forward(activation: str, x, gates, kernels, order: _Order):
  F, D = kernels[2].shape[1:]
  is_gated = kernels[0] is not None
  inputs = _sort(x, order)

  def run_chunk(chunk: _Chunk, state):
    outputs, gate_in, up_in = state
    gate_kernel, up_kernel, down_kernel = chunk.kernels
    rows = chunk.take(inputs)
    up = _product(rows, up_kernel).astype(x.dtype)
    gate = _product(rows, gate_kernel).astype(x.dtype) if is_gated else None
    outputs = chunk.put(outputs, _product(activate(activation, gate, up), down_kernel))
    return outputs, chunk.put(gate_in, gate) if is_gated else None, chunk.put(up_in, up)

  empty = lambda width: jnp.zeros((inputs.shape[0], width), x.dtype)
  state = empty(D), empty(F) if is_gated else None, empty(F)
  outputs, gate_in, up_in = _for_each_chunk(order, rounded(x.dtype, *kernels), run_chunk, state)
  y = jnp.einsum("tk,tkd->td", gates, _unsort(outputs, order).astype(jnp.float32)).astype(x.dtype)
  return y, (x, gates, kernels, order, outputs, gate_in, up_in)


def _backward(activation: str, residuals, y_gradient):
  x, gates, kernels, order, outputs, gate_in, up_in = residuals
  is_gated = kernels[0] is not None
  gates_gradient = jnp.einsum("td,tkd->tk", y_gradient, _unsort(outputs, order), preferred_element_type=jnp.float32)
  row_gates = gates.reshape(-1)[order.choice_of_row][:, None]
  output_gradients = _sort(y_gradient, order, row_gates)
  input_columns = _sort(x, order).T

  def run_chunk(chunk: _Chunk, state):
    input_gradients, *gradients = state
    gate_kernel, up_kernel, down_kernel = chunk.kernels
    gate = chunk.take(gate_in) if is_gated else None
    hidden, pullback = jax.vjp(partial(activate, activation), gate, chunk.take(up_in))
    rows = jnp.where(chunk.is_row[:, None], chunk.take(output_gradients), 0)
    of_kernels = [None, None, transposed_product(hidden, rows)]
    gate, up = pullback(_product(rows, down_kernel.T).astype(x.dtype))
    columns = chunk.take(input_columns, 1)
    of_kernels[1], gradient = _product(columns, up), _product(up, up_kernel.T)
    if is_gated:
      of_kernels[0] = _product(columns, gate)
      gradient += _product(gate, gate_kernel.T)
    gradients = [g if g is None else chunk.add(g, new) for g, new in zip(gradients, of_kernels, strict=True)]
    return chunk.put(input_gradients, gradient), *gradients

  zeros = lambda kernel: None if kernel is None else jnp.zeros(kernel.shape, jnp.float32)
  state = jnp.zeros(output_gradients.shape, x.dtype), *map(zeros, kernels)
  input_gradients, *gradients = _for_each_chunk(order, rounded(x.dtype, *kernels), run_chunk, state)
  x_gradient = jnp.sum(_unsort(input_gradients, order), axis=1, dtype=jnp.float32).astype(x.dtype)
  gradients = tuple(g if g is None else g.astype(kernels[1].dtype) for g in gradients)
  return x_gradient, gates_gradient, gradients, None


_mixture.defvjp(_forward, _backward)


class _Chunk(NamedTuple):
  """R rows of one expert from `start` on, of which the last may belong to the next expert.

  What is put there is garbage, until the next expert's chunks put their own.
  """

  expert: Int[Array, ""]
  kernels: list[Float[Array, "_ _"] | None]
  start: Int[Array, ""]
  is_row: Bool[Array, " R"]  # of this expert

  def take(self, array: Array, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, self.start, self.is_row.size, axis)

  def put(self, array: Float[Array, "S _"], rows: Float[Array, "R _"]) -> Float[Array, "S _"]:
    return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), self.start, 0)

  def add(self, gradients: Float[Array, "E D F"], gradient: Float[Array, "D F"]) -> Float[Array, "E D F"]:
    total = jax.lax.dynamic_index_in_dim(gradients, self.expert, keepdims=False) + gradient
    return jax.lax.dynamic_update_index_in_dim(gradients, total, self.expert, 0)


def _for_each_chunk(order: _Order, kernels: list[Any], run_chunk: Callable[[_Chunk, Any], Any], state: Any) -> Any:
  """Returns the state that run_chunk(chunk, state) leaves after every chunk of every expert."""
  counts, ends = order.counts, jnp.cumsum(order.counts)
  chunk_rows, rest_rows = _chunk_rows(order.choice_of_row.size, counts.size)

  def run_expert(expert, state):
    of_expert = [k if k is None else jax.lax.dynamic_index_in_dim(k, expert, keepdims=False) for k in kernels]
    end = ends[expert]

    def run_chunks(rows: int, fewest: int, start, state):
      def run(carry):
        start, state = carry
        return start + rows, run_chunk(_Chunk(expert, of_expert, start, jnp.arange(rows) < end - start), state)

      return jax.lax.while_loop(lambda carry: carry[0] + fewest <= end, run, (start, state))

    start = end - counts[expert]
    if chunk_rows > rest_rows:
      start, state = run_chunks(chunk_rows, max(1, chunk_rows - _MAX_REST_CHUNKS * rest_rows), start, state)
    return run_chunks(rest_rows, 1, start, state)[1]

  return jax.lax.fori_loop(0, counts.size, run_expert, state)


def _sort(array: Float[Array, "T D"], order: _Order, scale: Float[Array, "TK 1"] | None = None) -> Float[Array, "S D"]:
  rows = array[order.choice_of_row // order.row_of_choice.shape[1]]
  if scale is not None:
    rows = (rows * scale).astype(rows.dtype)
  chunk_rows, _ = _chunk_rows(rows.shape[0], order.counts.size)
  return jnp.pad(rows, ((0, chunk_rows), (0, 0)))


def _unsort(rows: Float[Array, "S D"], order: _Order) -> Float[Array, "T K D"]:
  """Returns the row of each choice, 0 for a choice of no expert."""
  is_computed = order.row_of_choice < jnp.sum(order.counts)
  return jnp.where(is_computed[..., None], rows[order.row_of_choice], 0)


def _product(x: Float[Array, "_ _"], y: Float[Array, "_ _"]) -> Float[Array, "_ _"]:
  return jnp.dot(x, y, preferred_element_type=jnp.float32)
