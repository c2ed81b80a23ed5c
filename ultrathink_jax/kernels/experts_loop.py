"""Mixture of experts, one expert after another, each over its own rows in chunks.

How many rows an expert has is known only when the router has spoken, so these are loops of dynamic length over chunks
of a few sizes, each half of the one before: an expert is padded to a multiple of the smallest, and hidden units stay in
the cache. This is the fast form on CPU, where products of many rows run at full speed and gathering a copy of the
weights for every block of rows (experts_sorted) costs more than they do.

Gradients of kernels come from rows that are transposed first: XLA on CPU takes long for products whose left operand is
transposed. Frozen kernels have none; those in few bits become numbers expert by expert.

Letters: T tokens of the whole batch  K choices of a token  E experts  D embed  F expert width  S sorted rows, one a
choice, and room for a chunk  R rows of a chunk  r rank of an adapter.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.activation import activate
from ultrathink_jax.kernels.bits import loaded, stored
from ultrathink_jax.kernels.experts import Bank, rank_in_expert
from ultrathink_jax.kernels.experts_sorted import experts_sorted
from ultrathink_jax.kernels.matmul import in_two_rows, transposed
from ultrathink_jax.kernels.quantized import in_dtype

_MOST_ROWS, _FEWEST_ROWS = 512, 32  # of a chunk
_FEW_TOKENS, _FEW_CHOICES = 32, 8
_MAX_BRANCHES = 16  # each is compiled


def _chunk_sizes(num_choices: int, num_experts: int) -> list[int]:
  """Returns how many rows chunks have, the largest first; fewer where experts have few."""
  size = max(1, min(_MOST_ROWS, num_choices // num_experts))
  sizes = [size]
  while size // 2 >= _FEWEST_ROWS:
    size //= 2
    sizes.append(size)
  return sizes


class _Order(NamedTuple):
  """The choices sorted by expert; those of no expert come last."""

  choice_of_row: Int[Array, " TK"]
  row_of_choice: Int[Array, "T K"]
  counts: Int[Array, " E"]  # rows of each expert


def experts_loop(
  x: Float[Array, "T D"],
  choices: Int[Array, "T K"],
  gates: Float[Array, "T K"],
  gate_kernel: Float[Array, "E D F"] | Bank | None,
  up_kernel: Float[Array, "E D F"] | Bank,
  down_kernel: Float[Array, "E F D"] | Bank,
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
  banks = _banks(gate_kernel, up_kernel, down_kernel)
  return _mixture(activation, x, gates.astype(jnp.float32), banks, order), is_computed


def _banks(*kernels: Float[Array, "E _ _"] | Bank | None) -> tuple[Bank | None, ...]:
  return tuple(kernel if kernel is None or isinstance(kernel, Bank) else Bank(kernel) for kernel in kernels)


def _of_expert(bank: Bank | None, expert: Int[Array, ""] | int, dtype: Any) -> Bank | None:
  """Returns the matrices of one expert in `dtype`."""
  if bank is None:
    return None
  one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), bank)
  return Bank(in_dtype(one.kernel, dtype), *(None if factor is None else factor.astype(dtype) for factor in one[1:]))


def _through(x: Float[Array, "R _"], one: Bank) -> Float[Array, "R _"]:
  """Returns x times the kernel + a b of an expert."""
  y = _product(x, one.kernel)
  return y if one.a is None else y + _product(_product(x, one.a).astype(x.dtype), one.b)


def _back_through(x: Float[Array, "R _"], one: Bank) -> Float[Array, "R _"]:
  """Returns x times the transpose of it. A transpose by itself would make XLA on CPU multiply float32, not bfloat16."""
  y = _transposed_product(x, one.kernel)
  return y if one.a is None else y + _transposed_product(_transposed_product(x, one.b).astype(x.dtype), one.a)


def _chosen(x, choices, gates, gate_kernel, up_kernel, down_kernel, activation: str) -> Float[Array, "T D"]:
  """Returns the mixture choice by choice. Of few experts each is a branch, which reads its kernels where they lie."""
  E = up_kernel.shape[0]
  gates = jnp.where(choices < E, gates, 0).astype(x.dtype)
  banks = _banks(gate_kernel, up_kernel, down_kernel)

  def run(expert: Int[Array, ""] | int, row: Float[Array, "1 D"]) -> Float[Array, "1 D"]:
    gate, up, down = (_of_expert(bank, expert, x.dtype) for bank in banks)
    through = lambda x, one: None if one is None else _through(x, one).astype(x.dtype)
    return through(activate(activation, through(row, gate), through(row, up)), down)

  def choose(expert: Int[Array, ""], row: Float[Array, "1 D"]) -> Float[Array, "1 D"]:
    if E > _MAX_BRANCHES:
      return run(expert, row)
    return jax.lax.switch(expert, [partial(run, branch) for branch in range(E)], row)

  T, K = choices.shape
  rows = [sum(gates[t, k] * choose(choices[t, k], x[t : t + 1]) for k in range(K)) for t in range(T)]
  return jnp.concatenate(rows)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(activation: str, x, gates, banks: tuple[Bank | None, ...], order: _Order) -> Float[Array, "T D"]:
  return _run(activation, x, gates, banks, order)[0]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Trained:
  """Which kernels and which adapters of (gate, up, down) have a gradient to be worked out."""

  kernels: tuple[bool, ...]
  adapters: tuple[bool, ...]


def _forward(activation: str, *arguments):
  """Takes what `_mixture` does, of which each array says whether anything that is differentiated depends on it."""
  is_perturbed = lambda tree: any(leaf.perturbed for leaf in jax.tree.leaves(tree))
  _, _, banks, _ = arguments
  trained = _Trained(
    tuple(bank is not None and is_perturbed(bank.kernel) for bank in banks),
    tuple(bank is not None and is_perturbed(bank[1:]) for bank in banks),
  )
  y, residuals = _run(activation, *jax.tree.map(lambda leaf: leaf.value, arguments))
  return y, (trained, *residuals)


def _run(activation: str, x, gates, banks, order: _Order):
  """Returns the mixture and what the backward pass needs."""
  F, D = banks[2].shape[1:]
  is_gated = banks[0] is not None
  inputs = _sort(x, order)

  def run_chunk(chunk: _Chunk, state, _):
    outputs, gate_in, up_in = state
    gate_bank, up_bank, down_bank = chunk.banks
    rows = chunk.take(inputs)
    up = _through(rows, up_bank).astype(x.dtype)
    gate = _through(rows, gate_bank).astype(x.dtype) if is_gated else None
    outputs = chunk.put(outputs, _through(activate(activation, gate, up), down_bank))
    return (outputs, chunk.put(gate_in, gate) if is_gated else None, chunk.put(up_in, up)), None

  empty = lambda width: stored(jnp.zeros((inputs.shape[0], width), x.dtype))
  state = empty(D), empty(F) if is_gated else None, empty(F)
  (outputs, gate_in, up_in), _ = _for_each_chunk(order, banks, x.dtype, run_chunk, state, None)
  y = jnp.einsum("tk,tkd->td", gates, _unsort(outputs, order).astype(jnp.float32)).astype(x.dtype)
  return y, (x, gates, banks, order, outputs, gate_in, up_in)


def _backward(activation: str, residuals, y_gradient):
  trained, x, gates, banks, order, outputs, gate_in, up_in = residuals
  is_gated = banks[0] is not None
  gates_gradient = jnp.einsum("td,tkd->tk", y_gradient, _unsort(outputs, order), preferred_element_type=jnp.float32)
  row_gates = gates.reshape(-1)[order.choice_of_row][:, None]
  output_gradients = _sort(y_gradient, order, row_gates)
  inputs = _sort(x, order)

  def run_chunk(chunk: _Chunk, input_gradients, sums):
    gate_sum, up_sum, down_sum = sums
    gate_bank, up_bank, down_bank = chunk.banks
    gate = chunk.take(gate_in) if is_gated else None
    hidden, pullback = jax.vjp(partial(activate, activation), gate, chunk.take(up_in))
    rows = jnp.where(chunk.is_row[:, None], chunk.take(output_gradients), 0)
    down_sum = _add_products(down_sum, down_bank, transposed(hidden), rows)
    gate, up = pullback(_back_through(rows, down_bank).astype(x.dtype))
    columns = transposed(chunk.take(inputs))
    up_sum = _add_products(up_sum, up_bank, columns, up)
    gradient = _back_through(up, up_bank)
    if is_gated:
      gradient += _back_through(gate, gate_bank)
      gate_sum = _add_products(gate_sum, gate_bank, columns, gate)
    return chunk.put(input_gradients, gradient), [gate_sum, up_sum, down_sum]

  state, zeros = jnp.zeros_like(output_gradients), _zero_gradients(banks, trained)
  input_gradients, gradients = _for_each_chunk(order, banks, x.dtype, run_chunk, state, zeros)
  x_gradient = jnp.sum(_unsort(input_gradients, order), axis=1, dtype=jnp.float32).astype(x.dtype)
  like = lambda gradient, leaf: None if gradient is None else gradient.astype(leaf.dtype)
  banks_gradient = tuple(
    None if bank is None else Bank(*map(like, gradient, bank)) for gradient, bank in zip(gradients, banks, strict=True)
  )
  return x_gradient, gates_gradient, banks_gradient, None


_mixture.defvjp(_forward, _backward, symbolic_zeros=True)


def _zero_gradients(banks: tuple[Bank | None, ...], trained: _Trained) -> list[Bank | None]:
  """Returns float32 zeros for what is trained of the banks, None in place of the rest."""
  zeros = lambda leaf: jnp.zeros(leaf.shape, jnp.float32)
  parts = zip(banks, trained.kernels, trained.adapters, strict=True)
  return [
    Bank(zeros(bank.kernel) if kernel else None, *(map(zeros, bank[1:]) if adapter else (None, None))) if bank else None
    for bank, kernel, adapter in parts
  ]


class _Chunk(NamedTuple):
  """R rows of one expert from `start` on, of which the last may belong to the next expert.

  What is put there is garbage, until the next expert's chunks put their own.
  """

  banks: list[Bank | None]  # the expert's matrices
  start: Int[Array, ""]
  is_row: Bool[Array, " R"]  # of this expert

  def take(self, array: Array) -> Float[Array, "R _"]:
    return loaded(jax.lax.dynamic_slice_in_dim(array, self.start, self.is_row.size))

  def put(self, array: Array, rows: Float[Array, "R _"]) -> Array:
    rows = stored(rows.astype(loaded(array).dtype))
    return jax.lax.dynamic_update_slice_in_dim(array, rows, self.start, 0)


def _add_products(sums: Bank, one: Bank, columns: Float[Array, "D R"], outputs: Float[Array, "R F"]) -> Bank:
  """Returns the sums with the gradients of an expert's matrices that a chunk adds; those that are None stay None.

  `columns` is the transpose of what went through the matrices, `outputs` the gradient of what came out.
  """
  kernel, a, b = sums
  if kernel is not None:
    kernel += _product(columns, outputs)
  if a is not None:
    a += _product(columns, _transposed_product(outputs, one.b).astype(outputs.dtype))
    b += _product(_product(one.a.T, columns).astype(outputs.dtype), outputs)
  return Bank(kernel, a, b)


def _for_each_chunk(
  order: _Order, banks: tuple[Bank | None, ...], dtype: Any, run_chunk: Callable, state: Any, sums: Any
) -> tuple[Any, Any]:
  """Returns what (state, sums of the expert) = run_chunk(chunk, state, sums of the expert) leaves after every chunk.

  Leaves of `sums`, all zero, are [E, ...]. Those of an expert are put in when its chunks are done, and stay in the
  cache until then.
  """
  counts, ends = order.counts, jnp.cumsum(order.counts)
  sizes = _chunk_sizes(order.choice_of_row.size, counts.size)

  def run_expert(expert, carry):
    state, sums = carry
    matrices, end = [_of_expert(bank, expert, dtype) for bank in banks], ends[expert]

    def run_chunks(size: int, carry):
      def run(carry):
        start, state, sums = carry
        return start + size, *run_chunk(_Chunk(matrices, start, jnp.arange(size) < end - start), state, sums)

      is_worth_it = lambda carry: carry[0] + size - sizes[-1] < end  # smaller chunks would not leave less empty
      return jax.lax.while_loop(is_worth_it, run, carry)

    carry = end - counts[expert], state, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), sums)
    for size in sizes:
      carry = run_chunks(size, carry)
    _, state, of_expert = carry
    put = lambda leaf, one: jax.lax.dynamic_update_index_in_dim(leaf, one, expert, 0)
    return state, jax.tree.map(put, sums, of_expert)

  return jax.lax.fori_loop(0, counts.size, run_expert, (state, sums))


def _sort(array: Float[Array, "T D"], order: _Order, scale: Float[Array, "TK 1"] | None = None) -> Array:
  """Returns a row of `array` for each choice, and room for a chunk, stored [S, D]."""
  rows = stored(array)[order.choice_of_row // order.row_of_choice.shape[1]]
  if scale is not None:
    rows = stored((loaded(rows) * scale).astype(array.dtype))
  most = _chunk_sizes(rows.shape[0], order.counts.size)[0]
  return jnp.pad(rows, ((0, most), (0, 0)))


def _unsort(rows: Array, order: _Order) -> Float[Array, "T K D"]:
  """Returns the row of each choice, 0 for a choice of no expert, of rows that are stored [S, D]."""
  is_computed = order.row_of_choice < jnp.sum(order.counts)
  return jnp.where(is_computed[..., None], loaded(rows[order.row_of_choice]), 0)


def _product(x: Float[Array, "R I"], y: Float[Array, "I O"]) -> Float[Array, "R O"]:
  return in_two_rows(lambda x: jnp.dot(x, y, preferred_element_type=jnp.float32), x)


def _transposed_product(x: Float[Array, "R O"], y: Float[Array, "I O"]) -> Float[Array, "R I"]:
  return jnp.einsum("ro,io->ri", x, y, preferred_element_type=jnp.float32)
