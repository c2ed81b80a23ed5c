"""A scan whose weights, sharded over fsdp, are gathered one turn before they are used.

Written as an ordinary scan, each turn would gather its own weights and wait for them: a compiler orders the work inside
a turn, and seldom moves any into the turn before. Here the gathered weights of the next turn are part of the loop's
carry, in the backward pass, from the last turn to the first, as well; nothing in a turn waits for the gather in it.
What the backward pass keeps of a turn is what the turn's remat policy saves; weights, which it gathers again, are not
among it where the turn is one jax.checkpoint, except the last turn's, which it needs first. Two turns' gathered weights
are held at a time.

Source: arXiv:2304.11277 section 3.3.1 (prefetching all-gathers).
Letters: R turns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# (gathered weights of a turn, carry, what goes with the turn, what all turns share) -> (carry, y)
Turn = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def scan_gathering_ahead(
  turn: Turn,
  gather: Callable[[Any], Any],
  scatter: Callable[[Any], Any],
  settle: Callable[[Any], Any],
  weights: Any,
  carry: Any,
  each: Any,
  shared: Any,
) -> tuple[Any, Any]:
  """Returns (carry, ys [R, ...]) after `turn` has run with gather(weights[r]) and each[r], r from 0 to R - 1 > 0.

  Differentiable in `weights` and `carry` alone.

  Args:
    gather: one turn's weights, as they rest -> as a turn uses them.
    scatter: the gradient of a turn's gathered weights -> that of the weights as they rest.
    settle: the gradients of all turns -> the same, laid out like `weights`.
    weights: leaves [R, ...].
    each: leaves [R, ...], such as random keys.
    shared: arrays that every turn reads.
  """
  R = jax.tree.leaves(weights)[0].shape[0]

  def forward(weights: Any, carry: Any, each: Any, shared: Any) -> tuple[tuple[Any, Any], Any]:
    def step(held: tuple[Any, Any], r: Array) -> tuple[tuple[Any, Any], Any]:
      gathered, carry = held
      ahead = gather(_at(weights, r + 1))
      (carry, y), pullback = _differentiate(turn, gathered, carry, _at(each, r), shared)
      return (ahead, carry), (y, pullback)

    held = gather(_at(weights, 0)), carry
    (last, carry), (ys, pullbacks) = jax.lax.scan(step, held, jnp.arange(R - 1))
    (carry, y), pullback = _differentiate(turn, last, carry, _at(each, R - 1), shared)
    ys = jax.tree.map(lambda before, now: jnp.concatenate([before, now[None]]), ys, y)
    return (carry, ys), (weights, shared, pullbacks, last, pullback)

  def backward(residuals: Any, gradients: tuple[Any, Any]) -> tuple[Any, Any, None, None]:
    weights, shared, pullbacks, last, pullback = residuals
    d_carry, d_ys = gradients

    def put(d_weights: Any, r: Array | int, gradient: Any) -> Any:
      return jax.tree.map(lambda total, new: total.at[r].set(new), d_weights, scatter(gradient))

    def step(held: tuple[Any, Any, Any], inputs: tuple[Array, Any, Any]) -> tuple[tuple[Any, Any, Any], None]:
      gathered, d_carry, d_weights = held
      r, pullback, d_y = inputs
      ahead = gather(_at(weights, jnp.maximum(r - 1, 0)))
      gradient, d_carry = _pull(pullback, gathered, shared, (d_carry, d_y))
      return (ahead, d_carry, put(d_weights, r, gradient)), None

    gathered = gather(_at(weights, R - 2))
    gradient, d_carry = _pull(pullback, last, shared, (d_carry, _at(d_ys, R - 1)))
    d_weights = put(settle(jax.tree.map(jnp.zeros_like, weights)), R - 1, gradient)
    inputs = jnp.arange(R - 1), pullbacks, jax.tree.map(lambda leaf: leaf[:-1], d_ys)
    (_, d_carry, d_weights), _ = jax.lax.scan(step, (gathered, d_carry, d_weights), inputs, reverse=True)
    return d_weights, d_carry, None, None

  run = jax.custom_vjp(lambda *args: forward(*args)[0])
  run.defvjp(forward, backward)
  return run(weights, carry, each, shared)


def _differentiate(turn: Turn, gathered: Any, carry: Any, each: Any, shared: Any) -> tuple[Any, Any]:
  """Returns what the turn gives, and its pullback without `gathered` and `shared`, which the caller keeps."""
  out, pullback = jax.vjp(lambda gathered, carry, shared: turn(gathered, carry, each, shared), gathered, carry, shared)
  pullback.args_res = [None, pullback.args_res[1], None]
  return out, pullback


def _pull(pullback: Any, gathered: Any, shared: Any, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
  """Returns the gradients of the gathered weights and of the carry of a turn."""
  pullback.args_res = [gathered, pullback.args_res[1], shared]
  return pullback(gradients)[:2]


def _at(tree: Any, r: Array | int) -> Any:
  return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, r, keepdims=False), tree)
