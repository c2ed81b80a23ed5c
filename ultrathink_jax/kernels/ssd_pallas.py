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

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.names import KERNEL_OUTPUT
from ultrathink_jax.kernels.pallas_call import on_platform, pallas_call, power_of_two, whole_rows
from ultrathink_jax.kernels.ssd import is_document_start

_PART_TOKENS = 512
_MAX_CHUNK = {"cpu": 64, "cuda": 64, "tpu": 128}  # tokens; on a GPU half of it in float32, to fit into shared memory
_BUFFERED_TOKENS = 8192  # longest row of which a TPU core holds the next one already
_CARRY_ROWS = 16  # of a state, carried by one program
_CARRY_LOADS = 8  # parts read ahead

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


class _PerToken(NamedTuple):
  """Numbers of tokens, along the rows of tiles and, where that is cheaper than a transpose, along their columns."""

  row: Float[Array, "*_ C 1 Q"]
  column: Float[Array, "*_ C Q 1"] | None


class _Decays(NamedTuple):
  """What the chunks need to know of decays: products of them, 0 across the start of a document."""

  document: _PerToken  # [B, C, ...]: documents begun in the chunk, up to here
  total: _PerToken  # [B, N, C, ...] as all below: sum of logs from the document's or, if later, the chunk's start
  from_start: _PerToken  # of the state before the chunk, at each token
  to_end: _PerToken  # from each token to the end of the chunk
  dt: _PerToken


class _Plan(NamedTuple):
  """How the work is cut, and the specs of what a program reads or writes of an array.

  P and Z are padded to sizes that Triton multiplies, rows to R parts.
  """

  platform: str
  B: int
  N: int
  K: int
  P: int
  Z: int
  R: int
  S: int
  Q: int

  @property
  def is_whole_row(self) -> bool:
    """Whether a program walks over all parts of a row."""
    return self.platform == "tpu"

  @property
  def length(self) -> int:
    return self.R * self.S * self.Q

  @property
  def grid(self) -> tuple[int, int, int]:
    """Heads of a group, which share b and c, follow one another: TPU counts the last dim first, GPU the first."""
    return (self.B, 1, self.N) if self.is_whole_row else (self.N, self.R, self.B)

  def spec(self, block: tuple[int | None, ...], index: Callable[..., Any], buffers: int = 1) -> pl.BlockSpec:
    """Returns the spec for an index of (row of the batch, part, head)."""
    return whole_rows(self.platform, block, index if self.is_whole_row else lambda n, r, i: index(i, r, n), buffers)

  def of_tokens(self, dim: int, heads_per_stream: int = 1) -> pl.BlockSpec:
    """Returns the spec for a stream of each head, or of each group."""
    stream = lambda n: n if heads_per_stream == 1 else jax.lax.div(n, heads_per_stream)
    if self.is_whole_row:
      buffers = self._buffers if heads_per_stream == 1 else 1
      return self.spec((None, None, self.length, dim), lambda i, r, n: (i, stream(n), 0, 0), buffers)
    return self.spec((None, self.S * self.Q, None, dim), lambda i, r, n: (i, r, stream(n), 0))

  def of_parts(self, array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Returns the spec for an array [B, N, _, _, _], or without N, of equally many entries a part."""
    each = array.shape[-3] if self.is_whole_row else array.shape[-3] // self.R
    block = (None,) * (array.ndim - 3) + (each, *array.shape[-2:])
    index = lambda i, r, n: (i, n, r, 0, 0) if array.ndim == 5 else (i, r, 0, 0)
    return self.spec(block, index, self._buffers)

  def of_states(self) -> pl.BlockSpec:
    return self.spec((None, None, self.P, self.Z), lambda i, r, n: (i, n, 0, 0), self._buffers)

  @property
  def _buffers(self) -> int:
    return 2 if self.length <= _BUFFERED_TOKENS else 1

  def padded(self, array: Float[Array, "B T N _"], dim: int) -> Array:
    """Returns the stream with whole parts and `dim` numbers a token, on TPU heads first."""
    array = jnp.pad(array, ((0, 0), (0, self.length - array.shape[1]), (0, 0), (0, dim - array.shape[3])))
    return jnp.moveaxis(array, 2, 1) if self.is_whole_row else array

  def unpadded(self, array: Array, length: int, dim: int) -> Float[Array, "B T N _"]:
    array = jnp.moveaxis(array, 1, 2) if self.is_whole_row else array
    return array[:, :length, :, :dim]

  def padded_state(self, state: Float[Array, "B N _ _"]) -> Float[Array, "B N P Z"]:
    return jnp.pad(state, ((0, 0), (0, 0), (0, self.P - state.shape[2]), (0, self.Z - state.shape[3])))

  def stream_shape(self, dim: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of a padded stream of each head."""
    dims = (self.N, self.length) if self.is_whole_row else (self.length, self.N)
    return jax.ShapeDtypeStruct((self.B, *dims, dim), dtype)

  def parts_shape(self, dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of one state a part."""
    return jax.ShapeDtypeStruct((self.B, self.N, self.R, self.P, self.Z), dtype)


def _make_plan(platform: str, chunk_tokens: int, x: Float[Array, "B T N P"], b: Float[Array, "B T K Z"]) -> _Plan:
  B, T, N, P = x.shape
  part = min(_PART_TOKENS, power_of_two(T))
  longest = _MAX_CHUNK[platform] if platform != "cuda" else _MAX_CHUNK[platform] * 2 // x.dtype.itemsize
  Q = max(16, min(longest, power_of_two(chunk_tokens + 1) // 2, part))
  return _Plan(platform, B, N, b.shape[2], power_of_two(P), power_of_two(b.shape[3]), -(-T // part), part // Q, Q)


def _make_decays(plan: _Plan, dt, decay_logs, starts) -> tuple[_Decays, Float[Array, "B C Q Q"]]:
  """Returns the decays, and 1 where token j is not after i and in its document."""

  def by_chunk(array: Array) -> Array:
    array = jnp.pad(array, ((0, 0), (0, plan.length - array.shape[1])) + ((0, 0),) * (array.ndim - 2))
    return array.reshape(plan.B, plan.R * plan.S, plan.Q, *array.shape[2:])

  # float32: small whole numbers, which it holds exactly and every backend can compare and add up.
  document = jnp.cumsum(by_chunk(starts).astype(jnp.float32), axis=2)
  seen = jnp.where(document[..., None] == document[..., None, :], jnp.tri(plan.Q), 0)
  # Never a difference of sums over other documents, whose rounding errors would survive.
  total = jnp.einsum("bcij,bcjn->bnci", seen, by_chunk(decay_logs), precision=jax.lax.Precision.HIGHEST)
  of_row = document[:, None]
  from_start = jnp.where(of_row == 0, jnp.exp(total), 0)
  to_end = jnp.exp(jnp.where(of_row == of_row[..., -1:], total[..., -1:] - total, -jnp.inf))
  arrays = document, total, from_start, to_end, jnp.moveaxis(by_chunk(dt), 3, 1)
  lay_out = lambda array: _PerToken(array[..., None, :], None if plan.is_whole_row else array[..., None])
  return _Decays(*map(lay_out, arrays)), seen


def _run_forward(platform: str, chunk_tokens: int, x, dt, decay_logs, b, c, state, starts):
  """Returns y, the last state and the state before each part."""
  T, P, Z = x.shape[1], x.shape[3], b.shape[3]
  plan = _make_plan(platform, chunk_tokens, x, b)
  decays, _ = _make_decays(plan, dt, decay_logs, starts)
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
    partial(_forward_kernel, plan.S),
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


def _carry_over_parts(plan: _Plan, x, decays: _Decays, b, direction: int, state: Float[Array, "B N P Z"]):
  """Returns the state before each part [B, N, R, P, Z] in the dtype of x, and the last.

  With a direction of -1: the gradient of the state after each part, and of the first, given y's gradient for x and c
  for b.
  """
  per_part = plan.parts_shape(jnp.float32)
  added = _call(
    partial(_contributions_kernel, direction),
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
    partial(_carry_kernel, direction),
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
  plan = _make_plan(platform, chunk_tokens, x, b)
  decays, seen = _make_decays(plan, dt, decay_logs, starts)
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
    partial(_backward_kernel, plan.S),
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


def _call(kernel: partial, plan: _Plan, decays: _Decays, in_specs: list[pl.BlockSpec], **kwargs) -> Callable[..., Any]:
  """Returns the compiled kernel, which sees the decays before its other arguments."""
  leaves, structure = jax.tree.flatten(decays)

  def with_decays(*refs):
    kernel(structure.unflatten(refs[: len(leaves)]), *refs[len(leaves) :])

  with_decays.__name__ = kernel.func.__name__
  in_specs = [*map(plan.of_parts, leaves), *in_specs]
  return partial(pallas_call(with_decays, plan.platform, grid=plan.grid, in_specs=in_specs, **kwargs), *leaves)


def _contributions_kernel(direction: int, decays: _Decays, x, b, added):
  """Writes what the chunks of a part add to the state after it or, backward, to the gradient of the one before it."""
  S, _, Q = decays.dt.row.shape

  def step(i, h):
    chunk = i if direction > 0 else S - 1 - i
    tokens = _tokens(chunk, Q)
    if direction > 0:
      return _next_state(h, x[tokens, :], b[tokens, :], decays, chunk)
    return _previous_gradient(h, x[tokens, :], b[tokens, :], decays, chunk)

  added[0] = jax.lax.fori_loop(0, S, step, jnp.zeros(added.shape[1:], jnp.float32))


def _carry_kernel(direction: int, kept, added, state, before, last):
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


def _forward_kernel(S: int, decays: _Decays, x, b, c, state, y, before=None, last=None):
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


def _backward_kernel(
  S: int, decays: _Decays, x, d, b, c, before, after, x_out, dt_out, total_out, b_out, c_out, state_out=None
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


def _next_state(h: Float[Array, "P Z"], x, b, decays: _Decays, chunk) -> Float[Array, "P Z"]:
  added = b * (_column(decays.to_end, chunk) * _column(decays.dt, chunk))
  return _kept(decays, chunk) * h + _dot_columns(x, added.astype(x.dtype))


def _previous_gradient(h_gradient: Float[Array, "P Z"], d, c, decays: _Decays, chunk) -> Float[Array, "P Z"]:
  """Returns the gradient of the state before the chunk, given that of the state after it."""
  carried = (c * _column(decays.from_start, chunk)).astype(d.dtype)
  return _kept(decays, chunk) * h_gradient + _dot_columns(d, carried)


def _between(decays: _Decays, chunk, reads_along_rows: bool) -> Float[Array, "Q Q"]:
  """Returns the decay from j to i, 0 where i does not see j: [j, i] if the tokens i that read lie along a row."""
  of_rows, of_columns = _column(decays.total, chunk), decays.total.row[chunk]
  row, column = _indices(of_columns.shape[1])
  is_seen, logs = (row <= column, of_columns - of_rows) if reads_along_rows else (column <= row, of_rows - of_columns)
  is_seen &= _column(decays.document, chunk) == decays.document.row[chunk]
  return jnp.exp(jnp.where(is_seen, logs, -jnp.inf))


def _kept(decays: _Decays, chunk) -> Float[Array, "1 1"]:
  """Returns how much of the state before the chunk is left at its end."""
  row, column = decays.from_start
  Q = row.shape[2]
  if column is not None:
    return column[chunk, pl.ds(Q - 1, 1), :]
  is_last = jax.lax.broadcasted_iota(jnp.int32, (1, Q), 1) == Q - 1
  return jnp.sum(jnp.where(is_last, row[chunk], 0), axis=1, keepdims=True)


def _indices(Q: int) -> tuple[Int[Array, "Q Q"], Int[Array, "Q Q"]]:
  return tuple(jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))


def _column(values: _PerToken, chunk) -> Float[Array, "Q 1"]:
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
