"""Pipeline parallelism: a group's periods lie over stages, and micro-batches pass through the stages in turn.

Every stage runs the same program, as a vmap over stages whose dim lies over the pipe axis, and hands its output to the
next by a shift of that dim. To the compiler these are ordinary sharded arrays, so the pipeline composes with every
other axis, and its backward pass is what differentiation makes of it. Several rounds, groups that repeat the same
letters, are run as a circular schedule: stage 0 takes up again what the last stage has finished, and the bubble is paid
once.

Source: arXiv:2105.04663 section 3.3 (stages as a vectorised dim), arXiv:2104.04473 section 2.2 (rounds).
Letters: S stages  M micro-batches  V rounds  R repeats of a period  k = R/S  B batch  b rows of a micro-batch = B/M
T length  D embed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ultrathink_jax.parallel.mesh import axis_size
from ultrathink_jax.parallel.sharding import constrain

_HIDDEN_AXES = ("batch", "length", None)


def num_ticks(stages: int, micro_batches: int, rounds: int = 1) -> int:
  """Returns how often every stage works, or waits, in a pass through the pipeline."""
  return micro_batches * rounds + stages - 1


def bubble_share(stages: int, micro_batches: int, rounds: int = 1) -> float:
  """Returns the share of ticks in which a stage has nothing to do."""
  return (stages - 1) / num_ticks(stages, micro_batches, rounds)


def pipeline(
  stage: Callable[[Any, Float[Array, "b T D"], Any, Key[Array, ""]], tuple[Float[Array, "b T D"], Any]],
  rounds: Sequence[Any],
  x: Float[Array, "B T D"],
  rows: Any,
  micro_batches: int,
  key: Key[Array, ""],
) -> tuple[Float[Array, "B T D"], list[Any]]:
  """Returns x after all periods of all rounds, and for each round what `stage` gives beside it, [R, M, ...].

  Args:
    stage: (parameters of k periods, x, rows, key) -> (x, aux of leaves [k, ...]).
    rounds: parameters of each round, leaves [R, ...]; R is a multiple of S. More than one round needs M >= S.
    rows: a tree of arrays [B, ...] that go with x.
  """
  S, M, V = axis_size("pipe"), micro_batches, len(rounds)
  weights = jax.tree.map(lambda *leaves: jnp.stack([_by_stage(leaf, S) for leaf in leaves], axis=1), *rounds)
  x, rows = split(x, M), jax.tree.map(lambda array: split(array, M), rows)
  stages = jnp.arange(S)

  def work(weights: Any, x: Array, item: Array, key: Key[Array, ""]) -> tuple[Array, Any]:
    now = jnp.clip(item, 0, V * M - 1)  # an idle stage repeats some item, and nothing reads what comes of it
    params = jax.tree.map(lambda w: w[0] if V == 1 else w[now // M], weights)
    return stage(params, x, jax.tree.map(lambda array: array[now % M], rows), key)

  work_at_once = jax.vmap(work, spmd_axis_name="pipe")

  def tick(carry: tuple[Array, Array], time: Array) -> tuple[tuple[Array, Array], Any]:
    finished, waiting = carry
    handed = jnp.roll(finished, 1, axis=0)
    # What the last stage finished waits at stage 0 for the next round; slot M takes what is not finished yet.
    waiting = waiting.at[:, jnp.where(time < S, M, (time - S) % M)].set(handed)
    is_first = (stages == 0)[:, None, None, None]
    x = constrain(jnp.where(is_first, waiting[:, time % M], handed), ("layers", *_HIDDEN_AXES))
    keys = jax.random.split(jax.random.fold_in(key, time), S)
    finished, aux = work_at_once(weights, x, time - stages, keys)
    return (constrain(finished, ("layers", *_HIDDEN_AXES)), waiting), aux

  slots = jnp.concatenate([x, jnp.zeros_like(x[:1])])
  waiting = constrain(jnp.broadcast_to(slots, (S, *slots.shape)), ("layers", None, *_HIDDEN_AXES))
  nothing = constrain(jnp.zeros((S, *x.shape[1:]), x.dtype), ("layers", *_HIDDEN_AXES))
  ticks = jnp.arange(num_ticks(S, M, V))
  (finished, waiting), aux = jax.lax.scan(tick, (nothing, waiting), ticks)
  done = waiting.at[:, M - 1].set(jnp.roll(finished, 1, axis=0))[0, :M]
  return join(done), [jax.tree.map(lambda leaf, v=v: _of_round(leaf, v, S, M), aux) for v in range(V)]


def split(array: Array, parts: int) -> Array:
  """Returns [B, ...] as [parts, B / parts, ...]; rows are dealt out, so that each device keeps its own."""
  dealt = jnp.moveaxis(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 1, 0)
  return constrain(dealt, (None, "batch", "length", *(None,) * (dealt.ndim - 3)))


def join(array: Array) -> Array:
  """Returns what `split` was given."""
  return jnp.moveaxis(array, 0, 1).reshape(-1, *array.shape[2:])


def _by_stage(leaf: Array, stages: int) -> Array:
  return leaf.reshape(stages, leaf.shape[0] // stages, *leaf.shape[1:])


def _of_round(leaf: Array, number: int, stages: int, micro_batches: int) -> Array:
  """Returns [ticks, S, k, ...] as [R, M, ...]: of each stage the ticks in which it worked on this round."""
  ticks = number * micro_batches + jnp.arange(micro_batches) + jnp.arange(stages)[:, None]
  values = leaf[ticks, jnp.arange(stages)[:, None]]  # [S, M, k, ...]
  return jnp.moveaxis(values, 2, 1).reshape(-1, micro_batches, *values.shape[3:])
