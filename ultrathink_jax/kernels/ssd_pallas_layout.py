"""How the scan of ssd_pallas.py is cut into programs and parts, and what they know of decays.

Letters: B batch  T length  R parts of a row  S chunks of a part  C = R S  Q chunk length (i, j inside)
N heads  K groups  P head dim  Z state size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ultrathink_jax.kernels.pallas_call import power_of_two, whole_rows

_PART_TOKENS = 512
_MAX_CHUNK = {"cpu": 64, "cuda": 64, "tpu": 128}  # tokens; on a GPU half of it in float32, to fit into shared memory
_BUFFERED_TOKENS = 8192  # longest row of which a TPU core holds the next one already


class PerToken(NamedTuple):
  """Numbers of tokens, along the rows of tiles and, where that is cheaper than a transpose, along their columns."""

  row: Float[Array, "*_ C 1 Q"]
  column: Float[Array, "*_ C Q 1"] | None


class Decays(NamedTuple):
  """What the chunks need to know of decays: products of them, 0 across the start of a document."""

  document: PerToken  # [B, C, ...]: documents begun in the chunk, up to here
  total: PerToken  # [B, N, C, ...] as all below: sum of logs from the document's or, if later, the chunk's start
  from_start: PerToken  # of the state before the chunk, at each token
  to_end: PerToken  # from each token to the end of the chunk
  dt: PerToken


class Plan(NamedTuple):
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


def make_plan(platform: str, chunk_tokens: int, x: Float[Array, "B T N P"], b: Float[Array, "B T K Z"]) -> Plan:
  B, T, N, P = x.shape
  part = min(_PART_TOKENS, power_of_two(T))
  longest = _MAX_CHUNK[platform] if platform != "cuda" else _MAX_CHUNK[platform] * 2 // x.dtype.itemsize
  Q = max(16, min(longest, power_of_two(chunk_tokens + 1) // 2, part))
  return Plan(platform, B, N, b.shape[2], power_of_two(P), power_of_two(b.shape[3]), -(-T // part), part // Q, Q)


def make_decays(plan: Plan, dt, decay_logs, starts) -> tuple[Decays, Float[Array, "B C Q Q"]]:
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
  lay_out = lambda array: PerToken(array[..., None, :], None if plan.is_whole_row else array[..., None])
  return Decays(*map(lay_out, arrays)), seen
