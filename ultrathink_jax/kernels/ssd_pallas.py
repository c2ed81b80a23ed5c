"""State-space duality as Pallas kernels: one program walks over the chunks of a row and head, its state on chip.

Neither the Q x Q matrices inside a chunk nor, in the forward pass, the states between chunks reach memory. The backward
pass walks over the chunks twice: forward for the states before each, then backward for the gradients. Heads of a group
leave their gradients of b and c apart, to be summed outside.

Source: arXiv:2405.21060 section 6. Unlike there, the chunks of a row are not parallel: rows times heads fill a device.
Letters: B batch  T length  C chunks of a row  Q chunk length  N heads  K groups  G = N/K  P head dim  Z state size.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.pallas_call import on_platform, pallas_call, power_of_two, whole_rows
from ultrathink_jax.kernels.ssd import is_document_start

_MAX_CHUNK = {"cpu": 128, "cuda": 64, "tpu": 128}  # tokens
_BUFFERED_TOKENS = 8192  # longest row of which a TPU core holds the next one already
_NUM_WARPS = 4
_BACKWARD_NUM_WARPS = 8


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
  """Returns what `ssd` does, for any T. A chunk has at most `chunk_tokens`, and at most 64 on a GPU and 128 elsewhere.

  Decays, the states and every sum are float32; the factors of the matrix products have the dtype of x. A TPU core
  holds a row of a head at once, in the backward pass that of eight such streams: up to about 30,000 tokens, on a v5p
  half of that.
  """
  B, _, N, P = x.shape
  heads_first = lambda array: jnp.moveaxis(array, 2, 1)
  dt = heads_first(dt.astype(jnp.float32))
  if state is None:
    state = jnp.zeros((B, N, P, b.shape[3]))
  starts = is_document_start(segment_ids)
  decay_logs = dt * a.astype(jnp.float32)[:, None]
  streams = (heads_first(x), dt, decay_logs, heads_first(b), heads_first(c))
  y, last = _scan(*streams, state.astype(jnp.float32), starts, chunk_tokens)
  return heads_first(y), last


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(
  x: Float[Array, "B N T P"],
  dt: Float[Array, "B N T"],
  decay_logs: Float[Array, "B N T"],
  b: Float[Array, "B K T Z"],
  c: Float[Array, "B K T Z"],
  state: Float[Array, "B N P Z"],
  starts: Bool[Array, "B T"],
  chunk_tokens: int,
) -> tuple[Float[Array, "B N T P"], Float[Array, "B N P Z"]]:
  return _scan_forward(x, dt, decay_logs, b, c, state, starts, chunk_tokens)[0]


def _scan_forward(x, dt, decay_logs, b, c, state, starts, chunk_tokens: int):
  inputs = (x, dt, decay_logs, b, c, state, starts)
  return on_platform(lambda platform, *arrays: _run_forward(platform, chunk_tokens, *arrays), *inputs), inputs


def _scan_backward(chunk_tokens: int, inputs, gradients):
  run = lambda platform, *arrays: _run_backward(platform, chunk_tokens, *arrays)
  return *on_platform(run, *inputs, *gradients), None


_scan.defvjp(_scan_forward, _scan_backward)


class _Blocks(NamedTuple):
  """Inputs padded to whole chunks and to sizes that Triton multiplies, and the specs of what a program reads."""

  arrays: tuple[Array, ...]  # x, dt, decay_logs, b, c, state, documents begun in the chunk
  specs: tuple[pl.BlockSpec, ...]


def _blocks(platform: str, chunk_tokens: int, x, dt, decay_logs, b, c, state, starts) -> _Blocks:
  _, N, T, P = x.shape
  K, Z = b.shape[1], b.shape[3]
  Q = max(16, min(_MAX_CHUNK[platform], power_of_two(chunk_tokens + 1) // 2, power_of_two(T)))
  C = -(-T // Q)
  P, Z = power_of_two(P), power_of_two(Z)
  x, b, c = _pad(x, C * Q, P), _pad(b, C * Q, Z), _pad(c, C * Q, Z)
  by_chunk = lambda array: jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, C * Q - T)]).reshape(
    *array.shape[:-1], C, 1, Q
  )
  # float32: small whole numbers, which it holds exactly and every backend can add up.
  document = jnp.cumsum(by_chunk(starts).astype(jnp.float32), axis=-1)
  of_head = lambda *dims: _of_head(platform, C * Q, *dims)
  of_group = whole_rows(platform, (None, None, C * Q, Z), lambda i, n: (i, jax.lax.div(n, N // K), 0, 0))
  of_row = pl.BlockSpec((None, C, 1, Q), lambda i, n: (i, 0, 0, 0))
  return _Blocks(
    (x, by_chunk(dt), by_chunk(decay_logs), b, c, _pad(state, P, Z), document),
    (of_head(C * Q, P), of_head(C, 1, Q), of_head(C, 1, Q), of_group, of_group, of_head(P, Z), of_row),
  )


def _of_head(platform: str, length: int, *dims: int) -> pl.BlockSpec:
  """Returns the spec of what a program reads or writes of an array [B, N, ...]."""
  buffers = 2 if length <= _BUFFERED_TOKENS else 1
  return whole_rows(platform, (None, None, *dims), lambda i, n: (i, n) + (0,) * len(dims), buffers)


def _pad(array: Array, rows: int, columns: int) -> Array:
  """Returns the array with its last two dims padded."""
  return jnp.pad(array, ((0, 0), (0, 0), (0, rows - array.shape[2]), (0, columns - array.shape[3])))


def _run_forward(platform: str, chunk_tokens: int, x, dt, decay_logs, b, c, state, starts):
  _, _, T, P = x.shape
  Z = b.shape[3]
  blocks = _blocks(platform, chunk_tokens, x, dt, decay_logs, b, c, state, starts)
  padded_x, padded_state = blocks.arrays[0], blocks.arrays[5]
  y, last = pallas_call(
    _forward_kernel,
    platform,
    grid=x.shape[:2],
    in_specs=blocks.specs,
    out_specs=[blocks.specs[0], blocks.specs[5]],
    out_shape=[
      jax.ShapeDtypeStruct(padded_x.shape, x.dtype),
      jax.ShapeDtypeStruct(padded_state.shape, jnp.float32),
    ],
    num_warps=_NUM_WARPS,
    num_stages=2,
  )(*blocks.arrays)
  return y[:, :, :T, :P], last[:, :, :P, :Z]


def _run_backward(platform: str, chunk_tokens: int, x, dt, decay_logs, b, c, state, starts, y_gradient, last_gradient):
  B, N, T, P = x.shape
  K, Z = b.shape[1], b.shape[3]
  blocks = _blocks(platform, chunk_tokens, x, dt, decay_logs, b, c, state, starts)
  x_spec, row_spec, _, _, _, state_spec, document_spec = blocks.specs
  x_, dt_, decay_logs_, b_, c_, state_, document = blocks.arrays
  C = document.shape[1]
  padded_z = b_.shape[3]
  per_head = _of_head(platform, x_.shape[2], x_.shape[2], padded_z)
  states_spec = _of_head(platform, x_.shape[2], C, *state_.shape[2:])
  states_shape = jax.ShapeDtypeStruct((B, N, C, *state_.shape[2:]), x.dtype)
  before = pallas_call(
    _states_kernel,
    platform,
    grid=(B, N),
    in_specs=[x_spec, row_spec, row_spec, blocks.specs[3], state_spec, document_spec],
    out_specs=states_spec,
    out_shape=states_shape,
    num_warps=_NUM_WARPS,
    num_stages=2,
  )(x_, dt_, decay_logs_, b_, state_, document)
  rows_shape = jax.ShapeDtypeStruct(dt_.shape, jnp.float32)
  of_group_shape = jax.ShapeDtypeStruct((B, N, x_.shape[2], padded_z), x.dtype)
  x_gradient, dt_gradient, log_gradient, b_gradient, c_gradient, state_gradient = pallas_call(
    _backward_kernel,
    platform,
    grid=(B, N),
    in_specs=[x_spec, row_spec, row_spec, *blocks.specs[3:5], document_spec, states_spec, x_spec, state_spec],
    out_specs=[x_spec, row_spec, row_spec, per_head, per_head, state_spec],
    out_shape=[
      jax.ShapeDtypeStruct(x_.shape, x.dtype),
      rows_shape,
      rows_shape,
      of_group_shape,
      of_group_shape,
      jax.ShapeDtypeStruct(state_.shape, jnp.float32),
    ],
    num_warps=_BACKWARD_NUM_WARPS,
    num_stages=1,
  )(
    *(x_, dt_, decay_logs_, b_, c_, document, before),
    _pad(y_gradient, *x_.shape[2:]),
    _pad(last_gradient.astype(jnp.float32), *state_.shape[2:]),
  )
  over_time = lambda rows: rows.reshape(B, N, -1)[:, :, :T]
  over_group = lambda array: jnp.sum(array.reshape(B, K, N // K, *array.shape[2:]), axis=2, dtype=jnp.float32)
  of_group = lambda array: over_group(array)[:, :, :T, :Z].astype(b.dtype)
  return (
    x_gradient[:, :, :T, :P],
    over_time(dt_gradient),
    over_time(log_gradient),
    of_group(b_gradient),
    of_group(c_gradient),
    state_gradient[:, :, :P, :Z],
  )


class _Decays(NamedTuple):
  """How much of a contribution is left, inside a chunk: a product of decays, 0 across the start of a document."""

  seen: Bool[Array, "Q Q"]  # j is not after i and in its document
  between: Float[Array, "Q Q"]  # from j to i
  from_start: Float[Array, "Q 1"]  # of the state before the chunk, at i
  to_end: Float[Array, "Q 1"]  # from j to the end of the chunk
  kept: Float[Array, "1 1"]  # of the state before the chunk, at its end


def _decays(logs: Float[Array, "1 Q"], document: Float[Array, "1 Q"]) -> _Decays:
  Q = logs.shape[1]
  row, column = _indices(Q)
  own_document = _as_column(document)
  seen = (own_document == document) & (column <= row)
  # Sums of the decays' logs from the start of the document or, if that lies before, of the chunk. Never a difference
  # of sums over other documents, whose rounding errors would survive.
  total = jnp.sum(jnp.where(seen, logs, 0), axis=1, keepdims=True)
  is_last = jax.lax.broadcasted_iota(jnp.int32, (1, Q), 1) == Q - 1
  at_end = lambda values: jnp.sum(jnp.where(is_last, values, 0), axis=1, keepdims=True)
  total_row = _as_row(total)
  total_at_end, last_document = at_end(total_row), at_end(document)
  return _Decays(
    seen,
    jnp.exp(jnp.where(seen, total - total_row, -jnp.inf)),
    jnp.where(own_document == 0, jnp.exp(total), 0),
    jnp.exp(jnp.where(own_document == last_document, total_at_end - total, -jnp.inf)),
    jnp.where(last_document == 0, jnp.exp(total_at_end), 0),
  )


def _forward_kernel(x, dt, logs, b, c, state, document, y, last):
  Q = dt.shape[-1]

  def step(chunk, h):
    tokens = pl.ds(pl.multiple_of(chunk * Q, Q), Q)
    x_, dt_, b_, c_ = x[tokens, :], dt[chunk], b[tokens, :], c[tokens, :]
    decays = _decays(logs[chunk], document[chunk])
    weights = _dot_rows(c_, b_) * decays.between * dt_
    carried = decays.from_start * _dot_rows(c_, h.astype(x_.dtype))
    y[tokens, :] = (_dot(weights.astype(x_.dtype), x_) + carried).astype(y.dtype)
    return _next_state(h, x_, dt_, b_, decays)

  last[...] = jax.lax.fori_loop(0, dt.shape[0], step, state[...])


def _states_kernel(x, dt, logs, b, state, document, before):
  Q = dt.shape[-1]

  def step(chunk, h):
    tokens = pl.ds(pl.multiple_of(chunk * Q, Q), Q)
    before[chunk] = h.astype(before.dtype)
    return _next_state(h, x[tokens, :], dt[chunk], b[tokens, :], _decays(logs[chunk], document[chunk]))

  jax.lax.fori_loop(0, dt.shape[0], step, state[...])


def _next_state(h: Float[Array, "P Z"], x, dt, b, decays: _Decays) -> Float[Array, "P Z"]:
  weighted = (x * (decays.to_end * _as_column(dt))).astype(x.dtype)
  return decays.kept * h + _dot_columns(weighted, b)


def _backward_kernel(
  x, dt, logs, b, c, document, before, y_gradient, last_gradient, x_out, dt_out, log_out, b_out, c_out, state_out
):
  C, _, Q = dt.shape
  dtype = x.dtype

  def step(i, h_gradient):  # of the state after the chunk
    chunk = C - 1 - i
    tokens = pl.ds(pl.multiple_of(chunk * Q, Q), Q)
    x_, dt_, b_, c_, d = x[tokens, :], dt[chunk], b[tokens, :], c[tokens, :], y_gradient[tokens, :]
    h = before[chunk]
    decays = _decays(logs[chunk], document[chunk])
    mixing = _dot_rows(c_, b_) * decays.between
    weights_gradient = _dot_rows(d, x_)
    scores_gradient = (weights_gradient * decays.between * dt_).astype(dtype)
    through_weights = weights_gradient * mixing  # times dt: of the logs of the decays between tokens

    # Of y: from inside the chunk, and from the state before it.
    carried_gradient = (d * decays.from_start).astype(dtype)
    to_c = _dot(carried_gradient, h)
    c_out[tokens, :] = (_dot(scores_gradient, b_) + to_c).astype(c_out.dtype)

    # Of the state after the chunk: through what each token adds to it.
    dt_column = _as_column(dt_)
    added_weight = decays.to_end * dt_column
    half_gradient = h_gradient.astype(dtype)
    to_x = _dot_rows(b_, half_gradient)
    weighted = (x_ * added_weight).astype(dtype)
    b_out[tokens, :] = (_dot_columns(scores_gradient, c_) + _dot(weighted, half_gradient)).astype(b_out.dtype)
    from_inside = _dot_columns((mixing * dt_).astype(dtype), d)
    x_out[tokens, :] = (from_inside + added_weight * to_x).astype(x_out.dtype)

    added_gradient = jnp.sum(x_ * to_x, axis=1, keepdims=True) * decays.to_end
    dt_out[chunk] = jnp.sum(through_weights, axis=0, keepdims=True) + _as_row(added_gradient)

    # Of the running sums of logs, then of the logs themselves.
    through_weights *= dt_
    added_gradient *= dt_column
    total_gradient = jnp.sum(through_weights, axis=1, keepdims=True) + jnp.sum(c_ * to_c, axis=1, keepdims=True)
    total_gradient -= added_gradient + _as_column(jnp.sum(through_weights, axis=0, keepdims=True))
    kept_gradient = jnp.sum(jnp.sum(h_gradient * h, axis=1, keepdims=True), axis=0, keepdims=True)
    at_end = jnp.sum(added_gradient, axis=0, keepdims=True) + decays.kept * kept_gradient
    is_last = jax.lax.broadcasted_iota(jnp.int32, (Q, 1), 0) == Q - 1
    total_gradient += jnp.where(is_last, at_end, 0)
    log_out[chunk] = jnp.sum(jnp.where(decays.seen, total_gradient, 0), axis=0, keepdims=True)
    return decays.kept * h_gradient + _dot_columns(carried_gradient, c_)

  state_out[...] = jax.lax.fori_loop(0, C, step, last_gradient[...])


def _indices(Q: int) -> tuple[Int[Array, "Q Q"], Int[Array, "Q Q"]]:
  return tuple(jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))


def _as_column(row: Float[Array, "1 Q"]) -> Float[Array, "Q 1"]:
  """Returns the transpose; by a sum, because TPU and GPU hold rows and columns in ways that have no cheap transpose."""
  i, j = _indices(row.shape[1])
  return jnp.sum(jnp.where(i == j, row, 0), axis=1, keepdims=True)


def _as_row(column: Float[Array, "Q 1"]) -> Float[Array, "1 Q"]:
  i, j = _indices(column.shape[0])
  return jnp.sum(jnp.where(i == j, column, 0), axis=0, keepdims=True)


def _product(left_dim: int, right_dim: int):
  def multiply(left: Array, right: Array) -> Array:
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

  return multiply


_dot = _product(1, 0)  # left right
_dot_rows = _product(1, 1)  # left right^T
_dot_columns = _product(0, 0)  # left^T right
