"""State-space duality as Pallas kernels: Q x Q matrices inside chunks stay on chip, states reach memory once a part.

A program walks over chunks of a row and head, its state on chip. On GPU it walks over one part of a row, and all parts
are parallel: a first kernel finds what each part adds to the state, a second carries the states over the parts, a third
has the outputs. On TPU, whose cores are few, a program walks over the whole row. The backward pass walks backward over
the chunks; the state before each follows again from the one before its part, which the forward pass leaves. Heads of a
group leave their gradients of b and c apart, to be summed outside.

Source: arXiv:2405.21060 section 6.
Letters: B batch  T length  R parts of a row  S chunks of a part  C = R S  Q chunk length (i, j inside)
N heads  K groups  G = N/K  P head dim  Z state size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.names import KERNEL_OUTPUT
from ultrathink_jax.kernels.pallas_call import on_platform, pallas_call
from ultrathink_jax.kernels.ssd import is_document_start
from ultrathink_jax.kernels.ssd_pallas_layout import Decays, Plan, make_decays, make_plan
from ultrathink_jax.kernels.ssd_pallas_programs import (
  backward_kernel,
  carry_kernel,
  contributions_kernel,
  forward_kernel,
)

_CARRY_ROWS = 16  # of a state, carried by one program

# Of Triton.
_CONTRIBUTIONS = {"num_warps": 4, "num_stages": 3}
_CARRY = {"num_warps": 4, "num_stages": 1}
_FORWARD = {"num_warps": 4, "num_stages": 2}
_BACKWARD = {"num_warps": 4, "num_stages": 1}
_BACKWARD_LARGE = {"num_warps": 8, "num_stages": 1}  # of states above 64 x 64, for which 4 warps lack registers


def ssd_pallas(
  x: Float[Array, "B T N P"],
  dt: Float[Array, "B T N"],
  a: Float[Array, " N"],
  b: Float[Array, "B T K Z"],
  c: Float[Array, "B T K Z"],
  segment_ids: Int[Array, "B T"],
  state: Float[Array, "B N P Z"] | None = None,
  chunk_tokens: int = 128,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P Z"]]:
  """Returns what `ssd` does, for any T. A chunk has at most `chunk_tokens`, and at most 128 on a TPU and 64 elsewhere.

  Decays, the states and every sum are float32; the factors of the matrix products, and the states that the backward
  pass and, on GPU, parts begin with, have the dtype of x. Nothing is copied on GPU where T is a multiple of 512, and P
  and Z are powers of two from 16 on. A TPU core holds a row of a head at once, in the backward pass that of eight such
  streams: up to about 30,000 tokens, on a v5p half of that.
  """
  B, _, N, P = x.shape
  dt = dt.astype(jnp.float32)
  if state is None:
    state = jnp.zeros((B, N, P, b.shape[3]))
  decay_logs = dt * a.astype(jnp.float32)
  return _scan(x, dt, decay_logs, b, c, state.astype(jnp.float32), is_document_start(segment_ids), chunk_tokens)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(
  x: Float[Array, "B T N P"],
  dt: Float[Array, "B T N"],
  decay_logs: Float[Array, "B T N"],
  b: Float[Array, "B T K Z"],
  c: Float[Array, "B T K Z"],
  state: Float[Array, "B N P Z"],
  starts: Bool[Array, "B T"],
  chunk_tokens: int,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P Z"]]:
  return _scan_forward(x, dt, decay_logs, b, c, state, starts, chunk_tokens)[0]


def _scan_forward(x, dt, decay_logs, b, c, state, starts, chunk_tokens: int):
  run = lambda platform, *arrays: _run_forward(platform, chunk_tokens, *arrays)
  outputs = on_platform(run, x, dt, decay_logs, b, c, state, starts)
  y, last, before = (checkpoint_name(array, KERNEL_OUTPUT) for array in outputs)
  return (y, last), (x, dt, decay_logs, b, c, starts, before)


def _scan_backward(chunk_tokens: int, residuals, gradients):
  run = lambda platform, *arrays: _run_backward(platform, chunk_tokens, *arrays)
  return *on_platform(run, *residuals, *gradients), None


_scan.defvjp(_scan_forward, _scan_backward)


def _run_forward(platform: str, chunk_tokens: int, x, dt, decay_logs, b, c, state, starts):
  """Returns y, the last state and the state before each part."""
  T, P, Z = x.shape[1], x.shape[3], b.shape[3]
  plan = make_plan(platform, chunk_tokens, x, b)
  decays, _ = make_decays(plan, dt, decay_logs, starts)
  x_, b_, c_ = plan.padded(x, plan.P), plan.padded(b, plan.Z), plan.padded(c, plan.Z)
  state = plan.padded_state(state)
  before = state[:, :, None]
  out_specs, out_shape = [plan.of_tokens(plan.P)], [plan.stream_shape(plan.P, x.dtype)]
  if plan.is_whole_row:
    out_shape += [plan.parts_shape(x.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    out_specs += [plan.of_parts(out_shape[1]), plan.of_states()]
  else:
    before, last = _carry_over_parts(plan, x_, decays, b_, 1, state)
  of_group = plan.of_tokens(plan.Z, plan.N // plan.K)
  y, *states = _call(
    partial(forward_kernel, plan.S),
    plan,
    decays,
    in_specs=[plan.of_tokens(plan.P), of_group, of_group, plan.of_parts(before)],
    out_specs=out_specs,
    out_shape=out_shape,
    **_FORWARD,
  )(x_, b_, c_, before)
  if states:
    before, last = states
  return plan.unpadded(y, T, P), last[:, :, :P, :Z], before


def _carry_over_parts(plan: Plan, x, decays: Decays, b, direction: int, state: Float[Array, "B N P Z"]):
  """Returns the state before each part [B, N, R, P, Z] in the dtype of x, and the last.

  With a direction of -1: the gradient of the state after each part, and of the first, given y's gradient for x and c
  for b.
  """
  per_part = plan.parts_shape(jnp.float32)
  added = _call(
    partial(contributions_kernel, direction),
    plan,
    decays,
    in_specs=[plan.of_tokens(plan.P), plan.of_tokens(plan.Z, plan.N // plan.K)],
    out_specs=plan.of_parts(per_part),
    out_shape=per_part,
    **_CONTRIBUTIONS,
  )(x, b)
  kept = jnp.prod(decays.from_start.row[..., -1].reshape(plan.B, plan.N, plan.R, plan.S), axis=3)
  rows = min(_CARRY_ROWS, plan.P)
  states = pl.BlockSpec((None, None, plan.R, rows, plan.Z), lambda p, n, i: (i, n, 0, p, 0))
  one_state = pl.BlockSpec((None, None, rows, plan.Z), lambda p, n, i: (i, n, p, 0))
  of_head = pl.BlockSpec((None, None, plan.R, 1, 1), lambda p, n, i: (i, n, 0, 0, 0))
  return pallas_call(
    partial(carry_kernel, direction),
    plan.platform,
    grid=(plan.P // rows, plan.N, plan.B),
    in_specs=[of_head, states, one_state],
    out_specs=[states, one_state],
    out_shape=[plan.parts_shape(x.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
    **_CARRY,
  )(kept[..., None, None], added, state)


def _run_backward(platform: str, chunk_tokens: int, x, dt, decay_logs, b, c, starts, before, y_gradient, last_gradient):
  """Returns the gradients of x, dt, the logs of the decays, b, c and the first state."""
  T, P, Z = x.shape[1], x.shape[3], b.shape[3]
  plan = make_plan(platform, chunk_tokens, x, b)
  decays, seen = make_decays(plan, dt, decay_logs, starts)
  x_, d = plan.padded(x, plan.P), plan.padded(y_gradient, plan.P)
  b_, c_ = plan.padded(b, plan.Z), plan.padded(c, plan.Z)
  last_gradient = plan.padded_state(last_gradient.astype(jnp.float32))
  after = last_gradient[:, :, None]
  per_token = decays.dt.row if plan.is_whole_row else decays.dt.column
  per_token = jax.ShapeDtypeStruct(per_token.shape, jnp.float32)
  of_head, of_group = plan.of_tokens(plan.P), plan.of_tokens(plan.Z, plan.N // plan.K)
  group_shape = plan.stream_shape(plan.Z, x.dtype)
  out_shape = [plan.stream_shape(plan.P, x.dtype), per_token, per_token, group_shape, group_shape]
  out_specs = [of_head, *map(plan.of_parts, out_shape[1:3]), *[plan.of_tokens(plan.Z)] * 2]
  if plan.is_whole_row:
    out_shape.append(jax.ShapeDtypeStruct(last_gradient.shape, jnp.float32))
    out_specs.append(plan.of_states())
  else:
    after, state_gradient = _carry_over_parts(plan, d, decays, c_, -1, last_gradient)
  x_gradient, dt_gradient, total_gradient, b_gradient, c_gradient, *states = _call(
    partial(backward_kernel, plan.S),
    plan,
    decays,
    in_specs=[of_head, of_head, of_group, of_group, *map(plan.of_parts, (before, after))],
    out_specs=out_specs,
    out_shape=out_shape,
    **(_BACKWARD if plan.P * plan.Z <= 64 * 64 else _BACKWARD_LARGE),
  )(x_, d, b_, c_, before, after)
  if states:
    (state_gradient,) = states
  by_chunk = lambda array: array.reshape(plan.B, plan.N, -1, plan.Q)
  log_gradient = jnp.einsum(
    "bcij,bnci->bcjn", seen, by_chunk(total_gradient), precision=jax.lax.Precision.HIGHEST
  ).reshape(plan.B, -1, plan.N)
  dt_gradient = jnp.moveaxis(dt_gradient.reshape(plan.B, plan.N, -1), 1, 2)

  def over_group(array: Array) -> Array:
    array = plan.unpadded(array, T, Z)
    return jnp.sum(array.reshape(plan.B, T, plan.K, -1, Z), axis=3, dtype=jnp.float32).astype(b.dtype)

  return (
    plan.unpadded(x_gradient, T, P),
    dt_gradient[:, :T],
    log_gradient[:, :T],
    over_group(b_gradient),
    over_group(c_gradient),
    state_gradient[:, :, :P, :Z],
  )


def _call(kernel: partial, plan: Plan, decays: Decays, in_specs: list[pl.BlockSpec], **kwargs) -> Callable[..., Any]:
  """Returns the compiled kernel, which sees the decays before its other arguments."""
  leaves, structure = jax.tree.flatten(decays)

  def with_decays(*refs):
    kernel(structure.unflatten(refs[: len(leaves)]), *refs[len(leaves) :])

  with_decays.__name__ = kernel.func.__name__
  in_specs = [*map(plan.of_parts, leaves), *in_specs]
  return partial(pallas_call(with_decays, plan.platform, grid=plan.grid, in_specs=in_specs, **kwargs), *leaves)
