"""The programs of ssd_pallas.py, which run on chip: each walks over chunks, forward or backward.

Source: arXiv:2405.21060 section 6.
Letters: R parts of a row  S chunks of a part  C = R S  Q chunk length (i, j inside)  P head dim  Z state size.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.ssd_pallas_layout import Decays, PerToken

_CARRY_LOADS = 8  # parts read ahead


def contributions_kernel(direction: int, decays: Decays, x, b, added):
  """Writes what the chunks of a part add to the state after it or, backward, to the gradient of the one before it."""
  S, _, Q = decays.dt.row.shape

  def step(i, h):
    chunk = i if direction > 0 else S - 1 - i
    tokens = _tokens(chunk, Q)
    if direction > 0:
      return _next_state(h, x[tokens, :], b[tokens, :], decays, chunk)
    return _previous_gradient(h, x[tokens, :], b[tokens, :], decays, chunk)

  added[0] = jax.lax.fori_loop(0, S, step, jnp.zeros(added.shape[1:], jnp.float32))


def carry_kernel(direction: int, kept, added, state, before, last):
  """Writes the state before each part, and the last; a few rows of them."""
  R = kept.shape[0]
  loads = math.gcd(R, _CARRY_LOADS)

  def step(i, h):
    parts = [i * loads + k if direction > 0 else R - 1 - (i * loads + k) for k in range(loads)]
    for r, kept_r, added_r in [(r, kept[r], added[r]) for r in parts]:
      before[r] = h.astype(before.dtype)
      h = kept_r * h + added_r
    return h

  last[...] = jax.lax.fori_loop(0, R // loads, step, state[...])


def forward_kernel(S: int, decays: Decays, x, b, c, state, y, before=None, last=None):
  """Writes y and, of a whole row, the state before each part and the last."""
  C, _, Q = decays.dt.row.shape

  def step(chunk, h):
    tokens = _tokens(chunk, Q)
    x_, b_, c_ = x[tokens, :], b[tokens, :], c[tokens, :]
    weights = _dot_rows(c_, b_) * _between(decays, chunk, reads_along_rows=False) * decays.dt.row[chunk]
    carried = _column(decays.from_start, chunk) * _dot_rows(c_, h.astype(x_.dtype))
    y[tokens, :] = (_dot(weights.astype(x_.dtype), x_) + carried).astype(y.dtype)
    return _next_state(h, x_, b_, decays, chunk)

  def walk(part, h):
    if before is not None:
      before[part] = h.astype(before.dtype)
    return jax.lax.fori_loop(0, S, lambda s, h: step(part * S + s, h), h)

  h = jax.lax.fori_loop(0, C // S, walk, state[0].astype(jnp.float32))
  if last is not None:
    last[...] = h


def backward_kernel(
  S: int, decays: Decays, x, d, b, c, before, after, x_out, dt_out, total_out, b_out, c_out, state_out=None
):
  """Writes the gradients; that of `decays.total` instead of the logs', and all that follows from it counted in."""
  C, _, Q = decays.dt.row.shape
  dtype = x.dtype

  def step(i, h_gradient):  # of the state after the chunk
    chunk = C - 1 - i
    part = jax.lax.div(chunk, S)
    walk = lambda k, h: _next_state(h, x[_tokens(k, Q), :], b[_tokens(k, Q), :], decays, k)
    h = jax.lax.fori_loop(part * S, chunk, walk, before[part].astype(jnp.float32))
    kept_gradient = jnp.sum(jnp.sum(h_gradient * h, axis=1, keepdims=True), axis=0, keepdims=True)
    h, half_gradient = h.astype(dtype), h_gradient.astype(dtype)
    tokens = _tokens(chunk, Q)
    x_, d_, b_, c_ = x[tokens, :], d[tokens, :], b[tokens, :], c[tokens, :]
    dt, to_end = _column(decays.dt, chunk), _column(decays.to_end, chunk)

    # Tiles have the token j that is read from along their rows, so that of products with them one needs a transpose.
    between = _between(decays, chunk, reads_along_rows=True)
    mixing = (_dot_rows(b_, c_) * between).astype(dtype)
    scores_gradient = (_dot_rows(x_, d_) * between * dt).astype(dtype)

    x_dt_gradient = _dot(mixing, d_) + to_end * _dot_rows(b_, half_gradient)
    x_out[tokens, :] = (dt * x_dt_gradient).astype(x_out.dtype)
    _write_column(dt_out, chunk, jnp.sum(x_ * x_dt_gradient, axis=1, keepdims=True))

    to_c = _column(decays.from_start, chunk) * _dot(d_, h) + _dot_columns(scores_gradient, b_)
    c_out[tokens, :] = to_c.astype(c_out.dtype)
    total_gradient = jnp.sum(c_ * to_c, axis=1, keepdims=True)
    inside = _dot(scores_gradient, c_)
    to_state = to_end * dt * _dot(x_, half_gradient)
    b_out[tokens, :] = (inside + to_state).astype(b_out.dtype)

    # What a token reads grows with its running sum, and shrinks with that of where it reads from. Both sums are of the
    # same rounded numbers, so that pairs of tokens after the one whose decay is asked for cancel.
    through_state = jnp.sum(b_ * to_state, axis=1, keepdims=True)
    total_gradient -= jnp.sum(b_ * inside, axis=1, keepdims=True) + through_state
    at_end = jnp.sum(through_state, axis=0, keepdims=True) + _kept(decays, chunk) * kept_gradient
    is_last = jax.lax.broadcasted_iota(jnp.int32, (Q, 1), 0) == Q - 1
    _write_column(total_out, chunk, total_gradient + jnp.where(is_last, at_end, 0))
    return _previous_gradient(h_gradient, d_, c_, decays, chunk)

  h_gradient = jax.lax.fori_loop(0, C, step, after[0].astype(jnp.float32))
  if state_out is not None:
    state_out[...] = h_gradient


def _tokens(chunk: Int[Array, ""], Q: int) -> Any:
  return pl.ds(pl.multiple_of(chunk * Q, Q), Q)


def _next_state(h: Float[Array, "P Z"], x, b, decays: Decays, chunk) -> Float[Array, "P Z"]:
  added = b * (_column(decays.to_end, chunk) * _column(decays.dt, chunk))
  return _kept(decays, chunk) * h + _dot_columns(x, added.astype(x.dtype))


def _previous_gradient(h_gradient: Float[Array, "P Z"], d, c, decays: Decays, chunk) -> Float[Array, "P Z"]:
  """Returns the gradient of the state before the chunk, given that of the state after it."""
  carried = (c * _column(decays.from_start, chunk)).astype(d.dtype)
  return _kept(decays, chunk) * h_gradient + _dot_columns(d, carried)


def _between(decays: Decays, chunk, reads_along_rows: bool) -> Float[Array, "Q Q"]:
  """Returns the decay from j to i, 0 where i does not see j: [j, i] if the tokens i that read lie along a row."""
  of_rows, of_columns = _column(decays.total, chunk), decays.total.row[chunk]
  row, column = _indices(of_columns.shape[1])
  is_seen, logs = (row <= column, of_columns - of_rows) if reads_along_rows else (column <= row, of_rows - of_columns)
  is_seen &= _column(decays.document, chunk) == decays.document.row[chunk]
  return jnp.exp(jnp.where(is_seen, logs, -jnp.inf))


def _kept(decays: Decays, chunk) -> Float[Array, "1 1"]:
  """Returns how much of the state before the chunk is left at its end."""
  row, column = decays.from_start
  Q = row.shape[2]
  if column is not None:
    return column[chunk, pl.ds(Q - 1, 1), :]
  is_last = jax.lax.broadcasted_iota(jnp.int32, (1, Q), 1) == Q - 1
  return jnp.sum(jnp.where(is_last, row[chunk], 0), axis=1, keepdims=True)


def _indices(Q: int) -> tuple[Int[Array, "Q Q"], Int[Array, "Q Q"]]:
  return tuple(jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))


def _column(values: PerToken, chunk) -> Float[Array, "Q 1"]:
  """Returns the chunk's numbers; by a sum, where there are only rows, because TPU has no cheap transpose of them."""
  if values.column is not None:
    return values.column[chunk]
  row = values.row[chunk]
  i, j = _indices(row.shape[1])
  return jnp.sum(jnp.where(i == j, row, 0), axis=1, keepdims=True)


def _write_column(out, chunk, column: Float[Array, "Q 1"]) -> None:
  if out.shape[2] != 1:
    i, j = _indices(column.shape[0])
    column = jnp.sum(jnp.where(i == j, column, 0), axis=0, keepdims=True)
  out[chunk] = column


def _product(left_dim: int, right_dim: int) -> Callable[[Array, Array], Array]:
  def multiply(left: Array, right: Array) -> Array:
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

  return multiply


_dot = _product(1, 0)  # left right
_dot_rows = _product(1, 1)  # left right^T
_dot_columns = _product(0, 0)  # left^T right
