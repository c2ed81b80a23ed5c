"""Expert parallelism: each device holds some of the experts, and tokens travel to the experts they chose.

A device gives every choice of its tokens a slot in a buffer of fixed size for the device of the chosen expert, buffers
are exchanged all to all, experts run on what came, and their outputs travel back to the slots. Only chosen rows move:
neither tokens nor kernels are gathered over the expert axis. Over fsdp kernels are gathered in the dtype of
activations, and their gradients summed and scattered in float32.

Source: arXiv:2006.16668 (exchange, capacity per group of tokens).
Letters: B batch  T length  t tokens of a device  K choices of a token  E experts  L experts of a device  D embed
F expert width  S slots.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.parallel.mesh import axis_size
from ultrathink_jax.parallel.sharding import constrain, is_spread, on_each_device

# (x [t, D], choices [t, K], gates [t, K], gate, up and down kernels, capacity) -> (y [t, D], is_computed [t, K])
Compute = Callable[..., tuple[Array, Array]]


def experts_over_mesh(
  compute: Compute,
  x: Float[Array, "B T D"],
  choices: Int[Array, "B T K"],
  gates: Float[Array, "B T K"],
  gate_kernel: Any,
  up_kernel: Any,
  down_kernel: Any,
  *,
  capacity_factor: float,
  buffer_factor: float,
  chunks: int,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T K"]]:
  """Returns sum_k gates[b, t, k] expert_{choices[b, t, k]}(x[b, t]) and which choices were computed.

  Kernels are [E, D, F], the last one [E, F, D]; on one device `compute` may take others, which are handed on to it.
  `compute` does that on one device. A choice of E marks a token that is not to be routed; the others of a token are
  distinct. What is not computed adds 0, and there are two ways to it, both in token order:

  - with a `capacity_factor` above 0 an expert takes at most that times its even share of each device's choices;
  - without one, a device takes at most `buffer_factor` times its even share of each other's choices, which is all of
    them if the factor is the size of the expert axis or more.

  Over an expert axis the tokens of a device are exchanged in `chunks` parts that do not wait for each other, so that
  one may travel while another is computed; shares are then those of a part. Each device holds a slice of F on the
  tensor axis, whose outputs are added up in float32.
  """
  devices, slices = axis_size("expert"), axis_size("tensor")

  def run(x, choices, gates, kernels):
    of_one_device = lambda kernel: kernel.reshape(kernel.shape[-3:]) if isinstance(kernel, jax.Array) else kernel
    kernels = tuple(map(of_one_device, kernels))
    arrays = [array.reshape(-1, array.shape[-1]) for array in (x, choices, gates)]
    if devices == 1:
      y, is_computed = compute(*arrays, *kernels, _capacity(choices, kernels[1].shape[0], capacity_factor))
    else:
      exchange = partial(_exchanged, compute, kernels, devices, capacity_factor, buffer_factor)
      parts = zip(*(jnp.array_split(array, min(chunks, arrays[0].shape[0])) for array in arrays), strict=True)
      y, is_computed = (jnp.concatenate(results) for results in zip(*(exchange(*part) for part in parts), strict=True))
    if slices > 1:
      y = _sum_over_tensor(y.astype(jnp.float32))
    return y.astype(x.dtype).reshape(x.shape), is_computed.reshape(choices.shape)

  rows, inward, outward = ("batch", "length", None), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
  kernels, layouts = [gate_kernel, up_kernel, down_kernel], [inward, inward, outward]
  if is_spread():
    kernels = [None if k is None else _copies(k, axes, x.dtype) for k, axes in zip(kernels, layouts, strict=True)]
  layouts = [None if k is None else _copies_axes(axes) for k, axes in zip(kernels, layouts, strict=True)]
  return on_each_device(run, (rows, rows, rows, layouts), (rows, rows))(x, choices, gates, kernels)


_EACH = ("each_data", "each_fsdp", "each_context")


def _copies_axes(axes: tuple[str, ...]) -> tuple[str | None, ...]:
  return *_EACH, *(None if name == "embed" else name for name in axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(kernel: Float[Array, "E _ _"], axes: tuple[str, ...], dtype: jnp.dtype) -> Float[Array, "_ _ _ E _ _"]:
  """Returns the kernel in `dtype`, gathered over fsdp, as an array with a slice for each device that holds it.

  A device's gradient is then that of its own slice, and stays with it until it is summed here: scattered over fsdp in
  the same exchange, where one kernel for all would have its whole gradient summed on every device.
  """
  gathered = constrain(kernel.astype(dtype), _copies_axes(axes)[len(_EACH) :])
  sizes = [axis_size(name.removeprefix("each_")) for name in _EACH]
  return constrain(jnp.broadcast_to(gathered, (*sizes, *kernel.shape)), _copies_axes(axes))


def _copies_forward(kernel, axes, dtype):
  return _copies(kernel, axes, dtype), jnp.zeros((), kernel.dtype)


def _copies_backward(axes, dtype, like, gradient):
  gradient = jnp.sum(gradient.astype(jnp.float32), axis=2)
  gradient = constrain(gradient, (*_EACH[:2], *_copies_axes(axes)[len(_EACH) :]))
  gradient = constrain(jnp.sum(gradient, axis=1), (_EACH[0], *axes))
  return (constrain(jnp.sum(gradient, axis=0), axes).astype(like.dtype),)


_copies.defvjp(_copies_forward, _copies_backward)


def _capacity(choices: Int[Array, "..."], num_experts: int, factor: float) -> int | None:
  """Returns the rows that an expert takes of all `choices`; None for no limit."""
  num_tokens = choices.size // choices.shape[-1]
  return min(num_tokens, math.ceil(factor * choices.size / num_experts)) if factor else None


def _exchanged(
  compute: Compute, kernels: tuple, devices: int, capacity_factor: float, buffer_factor: float, x, choices, gates
) -> tuple[Float[Array, "t D"], Bool[Array, "t K"]]:
  """Returns the float32 mixture of a device's tokens, from experts on all devices, and which choices are in it."""
  K, L = choices.shape[1], kernels[1].shape[0]
  slots = _assign(choices, L, devices, capacity_factor, buffer_factor)
  swap = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
  rows = swap(_take_rows(x, slots.choice_of_slot // K, slots.slot_of_choice))
  local = swap(jnp.take(choices.reshape(-1) % L, slots.choice_of_slot, mode="fill", fill_value=L))[:, None]
  most = None if slots.capacity is None else slots.capacity * devices
  rows, _ = compute(rows, local, jnp.ones(local.shape, gates.dtype), *kernels, most)
  rows = _take_rows(swap(rows), slots.slot_of_choice, slots.choice_of_slot)
  y = jnp.einsum("tk,tkd->td", gates, rows, preferred_element_type=jnp.float32)
  return y, slots.slot_of_choice < slots.choice_of_slot.size


class _Slots(NamedTuple):
  """Which slot holds which choice. A slot S or a choice t K (one past the last) means none.

  An expert has at most `capacity` of them; None: no limit but the number of slots.
  """

  slot_of_choice: Int[Array, "t K"]
  choice_of_slot: Int[Array, " S"]
  capacity: int | None


def _assign(choices: Int[Array, "t K"], L: int, devices: int, capacity_factor: float, buffer_factor: float) -> _Slots:
  """Returns the slots of the choices, first come first served; a choice of E wants none.

  A bin of slots is an expert's where there is a capacity, else that of all experts of a device.
  """
  t, K = choices.shape
  capacity = _capacity(choices, L * devices, capacity_factor)
  if capacity is None:
    flat, num_bins = choices.reshape(-1) // L, devices
    rows_of_bin = min(t * min(K, L), math.ceil(buffer_factor * t * K / devices))
  else:
    flat, num_bins, rows_of_bin = choices.reshape(-1), L * devices, capacity
  order = jnp.argsort(flat, stable=True)
  place = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=flat.dtype), unique_indices=True)
  counts = jnp.sum(flat[:, None] == jnp.arange(num_bins), axis=0, dtype=flat.dtype)
  first = jnp.cumsum(counts) - counts
  rank = place - jnp.append(first, 0)[flat]
  num_slots = num_bins * rows_of_bin
  slot = jnp.where((flat < num_bins) & (rank < rows_of_bin), flat * rows_of_bin + rank, num_slots)
  row = jnp.arange(rows_of_bin, dtype=flat.dtype)
  choice = jnp.take(order, first[:, None] + row, mode="fill", fill_value=flat.size)
  choice = jnp.where(row < counts[:, None], choice, flat.size)
  return _Slots(slot.reshape(choices.shape), choice.reshape(-1), capacity)


@jax.custom_vjp
def _take_rows(rows: Float[Array, "_ D"], index: Int[Array, "..."], users: Int[Array, "..."]) -> Float[Array, "... D"]:
  """Returns rows[index], 0 where an index is one past the last row.

  `users` names, for each of `rows`, the places in the flat `index` that read it, so that the gradient is a gather too.
  """
  return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _take_rows_forward(rows, index, users):
  return _take_rows(rows, index, users), (index, users)


def _take_rows_backward(residuals, gradient):
  index, users = residuals
  gradient = jnp.take(gradient.reshape(index.size, -1), users, axis=0, mode="fill", fill_value=0)
  if users.ndim > 1:
    gradient = jnp.sum(gradient, axis=1, dtype=jnp.float32).astype(gradient.dtype)
  return gradient, None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def _sum_over_tensor(y: Float[Array, "t D"]) -> Float[Array, "t D"]:
  """Returns the sum over the devices of the tensor axis.

  All of them get the same gradient, each its share of it, so that what the sum's gradient is needs no second exchange.
  """
  return jax.lax.psum(y, "tensor")


def _sum_over_tensor_forward(y):
  return _sum_over_tensor(y), None


def _sum_over_tensor_backward(_, gradient):
  return (gradient * jax.lax.axis_size("tensor"),)


_sum_over_tensor.defvjp(_sum_over_tensor_forward, _sum_over_tensor_backward)
