"""Mixture of experts on rows sorted by expert: work follows the chosen experts, and moving rows is all gathers.

Every choice of a token gets a slot in a buffer of rows. With a capacity the buffer is [E, C]: C slots an expert, and
what finds none is dropped. Without one it is [M, R]: an expert's rows are padded up to whole blocks of R slots, so that
nothing is dropped and at most E blocks of work are wasted.

Source: arXiv:2211.15841 (blocks). Letters: T tokens of the whole batch  K choices of a token  E experts  D embed
F expert width  C capacity  M blocks  R rows of a block  S slots = E C or M R.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.activation import activate
from ultrathink_jax.kernels.experts import Bank, rounded
from ultrathink_jax.kernels.names import KERNEL_OUTPUT

_BLOCK_ROWS = 128


class Plan(NamedTuple):
  """Which slot holds which choice. A slot S or a choice T K (one past the last) means none."""

  slot_of_choice: Int[Array, "T K"]
  choice_of_slot: Int[Array, " S"]


def experts_sorted(
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
  E, D = up_kernel.shape[:2]
  gate_kernel, up_kernel, down_kernel = rounded(x.dtype, gate_kernel, up_kernel, down_kernel)
  counts = jnp.sum(jax.nn.one_hot(choices.reshape(-1), E, dtype=jnp.int32), axis=0)
  if capacity is None:
    block = min(_BLOCK_ROWS, max(8, -(-choices.size // E)))
    first_slot = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-counts // block) * block)])
    num_blocks = -(-choices.size // block) + E
    plan = plan_rows(choices, first_slot[:-1], counts, choices.size, num_blocks * block)
    expert_of_block = jnp.searchsorted(first_slot[1:], jnp.arange(num_blocks) * block, side="right")
    expert_of_block = jnp.minimum(expert_of_block, E - 1)
    of_block = lambda kernel: _kernel_of_block(kernel, expert_of_block)
    buffer = (num_blocks, block, D)
  else:
    plan = plan_rows(choices, jnp.arange(E, dtype=jnp.int32) * capacity, counts, capacity, E * capacity)
    of_block = lambda kernel: kernel
    buffer = (E, capacity, D)
  rows = dispatch(x, plan).reshape(buffer)
  product = lambda rows, kernel: checkpoint_name(jnp.einsum("erd,edf->erf", rows, of_block(kernel)), KERNEL_OUTPUT)
  gate = None if gate_kernel is None else product(rows, gate_kernel)
  hidden = activate(activation, gate, product(rows, up_kernel))
  rows = product(hidden, down_kernel).reshape(-1, D)
  return combine(rows, gates.astype(x.dtype), plan), plan.slot_of_choice < rows.shape[0]


def plan_rows(choices, first_slot, counts, capacity: int, num_slots: int) -> Plan:
  """Returns the slots: an expert's first `capacity` choices, in token order, from its `first_slot` on."""
  E = counts.shape[0]
  flat = choices.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  expert = flat[order]
  rank = jnp.arange(flat.size, dtype=jnp.int32) - jnp.append(jnp.cumsum(counts) - counts, 0)[expert]
  is_computed = (expert < E) & (rank < capacity)
  slot = jnp.where(is_computed, jnp.append(first_slot, 0)[expert] + rank, num_slots)
  slot_of_choice = jnp.zeros_like(flat).at[order].set(slot, unique_indices=True)
  choice_of_slot = jnp.full(num_slots, flat.size, jnp.int32).at[slot].set(order, mode="drop")
  plan = Plan(slot_of_choice.reshape(choices.shape), choice_of_slot)
  return jax.tree.map(lambda array: checkpoint_name(array, KERNEL_OUTPUT), plan)  # not to sort again


def _take(rows: Float[Array, "S D"], indices: Int[Array, "..."]) -> Float[Array, "... D"]:
  """Returns rows[indices], 0 where an index is one past the last row."""
  return jnp.take(rows, indices, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "S D"]:
  """Returns the row of each slot. Its gradient is a gather too: a choice has one slot."""
  return _take(x, plan.choice_of_slot // plan.slot_of_choice.shape[1])


def _dispatch_forward(x, plan):
  return dispatch(x, plan), plan


def _dispatch_backward(plan, rows_gradient):
  return jnp.sum(_take(rows_gradient, plan.slot_of_choice), axis=1), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "S D"], gates: Float[Array, "T K"], plan: Plan) -> Float[Array, "T D"]:
  """Returns sum_k gates[t, k] rows[slot of (t, k)]; like dispatch, gathers both ways."""
  return jnp.einsum("tk,tkd->td", gates, _take(rows, plan.slot_of_choice))


def _combine_forward(rows, gates, plan):
  return combine(rows, gates, plan), (rows, gates, plan)


def _combine_backward(residuals, gradient):
  rows, gates, plan = residuals
  token_gradient = _take(gradient, plan.choice_of_slot // gates.shape[1])
  rows_gradient = token_gradient * _take(gates.reshape(-1, 1), plan.choice_of_slot)
  gates_gradient = jnp.einsum("td,tkd->tk", gradient, _take(rows, plan.slot_of_choice))
  return rows_gradient, gates_gradient, None


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def _kernel_of_block(kernel: Float[Array, "E D F"], expert_of_block: Int[Array, " M"]) -> Float[Array, "M D F"]:
  """Returns the kernel each block uses. Its gradient sums blocks by a matrix product instead of a scatter."""
  return kernel[expert_of_block]


def _kernel_of_block_forward(kernel, expert_of_block):
  return kernel[expert_of_block], (expert_of_block, jnp.zeros(kernel.shape[0], bool))


def _kernel_of_block_backward(residuals, gradient):
  expert_of_block, experts_like = residuals
  one_hot = jax.nn.one_hot(expert_of_block, experts_like.shape[0])
  summed = jnp.einsum("me,mdf->edf", one_hot, gradient.astype(jnp.float32))
  return summed.astype(gradient.dtype), None


_kernel_of_block.defvjp(_kernel_of_block_forward, _kernel_of_block_backward)
