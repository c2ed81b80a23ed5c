"""Rows whose length is split over the context axis: attention over all of them, and what recurrences hand on.

Everything here runs inside `sharding.on_each_device`.

Source: arXiv:2407.21783 section 3.3.2 (keys gathered; each device takes an early and a late part of the queries, which
evens out the causal mask as the stripes of arXiv:2311.09431 do), arXiv:2405.21060 section 8.2 (states handed on).
Letters: B batch  T length of a shard  t length of half a shard  S length of all shards  N query heads  K kv heads
H head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ultrathink_jax.parallel.mesh import axis_size

_AXIS = "context"


def attention_over_context(
  attend: Callable[..., Array],
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  positions: Int[Array, "B S"],
  segment_ids: Int[Array, "B S"],
  window_tokens: int | None,
) -> Float[Array, "B T N H"]:
  """Returns causal attention of this shard's tokens over the tokens of all shards.

  `attend` takes queries, keys, values, positions and segment ids of both, and the index of the first query among the
  keys; no query sees a key behind its own. Where a window reaches no further than one shard back, the end of that shard
  is all that is moved. Otherwise every shard receives all keys and values, and works on the half shards i and
  2 c - 1 - i of c shards, which together have the same number of keys for every i: of 2 B S K H numbers of keys and
  values, (c - 1) / c come in, and queries and outputs are exchanged, B T N H each. The gradients of keys and values go
  the other way in float32, in which they are summed.
  """
  shards, T = axis_size(_AXIS), query.shape[1]
  if shards == 1:
    return attend(query, key, value, positions, positions, segment_ids, segment_ids, 0)
  if window_tokens is not None and window_tokens - 1 <= T:
    return _attend_to_neighbour(attend, query, key, value, positions, segment_ids, window_tokens - 1)
  half = T // 2
  keys, values = _gather(key), _gather(value)
  moves = [_to_workers(parity, shards) for parity in (0, 1)]
  parts = [jax.lax.ppermute(query[:, half * parity : half * (parity + 1)], _AXIS, moves[parity]) for parity in (0, 1)]

  def work_of(shard: int) -> Callable[..., list[Array]]:
    def work(parts: list[Array], keys: Array, values: Array) -> list[Array]:
      outs = []
      for number in sorted((shard, 2 * shards - 1 - shard), key=lambda number: number % 2):
        tokens = slice(number * half, (number + 1) * half)
        where = (positions[:, tokens], positions, segment_ids[:, tokens], segment_ids)
        outs.append(attend(parts[number % 2], keys, values, *where, tokens.start))
      return outs

    return work

  outs = jax.lax.switch(jax.lax.axis_index(_AXIS), list(map(work_of, range(shards))), parts, keys, values)
  home = [[(worker, holder) for holder, worker in pairs] for pairs in moves]
  return jnp.concatenate([jax.lax.ppermute(out, _AXIS, pairs) for out, pairs in zip(outs, home, strict=True)], axis=1)


def _to_workers(parity: int, shards: int) -> list[tuple[int, int]]:
  """Returns (holder, worker) of the even or odd half shards; each worker gets one of each."""
  numbers = [(holder, 2 * holder + parity) for holder in range(shards)]
  return [(holder, min(number, 2 * shards - 1 - number)) for holder, number in numbers]


def _attend_to_neighbour(attend, query, key, value, positions, segment_ids, reach: int):
  T = query.shape[1]
  mine = lambda array: jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(_AXIS) * T, T, axis=1)
  positions, segment_ids = mine(positions), mine(segment_ids)
  keys, values, *of_keys = (with_left_border(array, reach) for array in (key, value, positions, segment_ids))
  return attend(query, keys, values, positions, of_keys[0], segment_ids, of_keys[1], reach)


def with_left_border(array: Shaped[Array, "B T *rest"], width: int) -> Shaped[Array, "B _ *rest"]:
  """Returns the shard behind the last `width` tokens of the shard before it; before the first shard all is 0."""
  assert width <= array.shape[1], "the border reaches over more than one shard"
  pairs = [(shard, shard + 1) for shard in range(axis_size(_AXIS) - 1)]
  border = jax.lax.ppermute(array[:, array.shape[1] - width :], _AXIS, pairs)
  return jnp.concatenate([border, array], axis=1)


def state_before(added: Float[Array, "B N *state"], kept: Float[Array, "B N"]) -> Float[Array, "B N *state"]:
  """Returns the state at the left border of this shard, where shard i makes h into kept_i h + added_i; 0 at the first.

  All shards receive what all of them add.
  """
  all_added, all_kept = jax.lax.all_gather(added, _AXIS), jax.lax.all_gather(kept, _AXIS)
  state = jnp.zeros_like(added)
  for shard in range(axis_size(_AXIS) - 1):
    factor = all_kept[shard].reshape(*kept.shape, *(1,) * (added.ndim - kept.ndim))
    state = jnp.where(shard < jax.lax.axis_index(_AXIS), factor * state + all_added[shard], state)
  return state


@jax.custom_vjp
def _gather(part: Float[Array, "B T K H"]) -> Float[Array, "B S K H"]:
  return jax.lax.all_gather(part, _AXIS, axis=1, tiled=True)


def _gather_backward(_, gradient: Float[Array, "B S K H"]) -> tuple[Float[Array, "B T K H"]]:
  summed = jax.lax.psum_scatter(gradient.astype(jnp.float32), _AXIS, scatter_dimension=1, tiled=True)
  return (summed.astype(gradient.dtype),)


_gather.defvjp(lambda part: (_gather(part), None), _gather_backward)
