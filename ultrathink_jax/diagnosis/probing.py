"""The first steps of a run on synthetic tokens, looked at closely.

Letters: B batch  T length  V vocab  R repeats of a period.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ultrathink_jax.config import Config
from ultrathink_jax.models.components import component
from ultrathink_jax.models.language_model import LanguageModel, logits, variables
from ultrathink_jax.parallel.mesh import batch_ways
from ultrathink_jax.parallel.placement import place
from ultrathink_jax.train.plan import Plan, compile_step
from ultrathink_jax.train.state import make_init
from ultrathink_jax.types import Batch, Context, Parameters, Recipe, TrainState

NUM_STEPS = 10
_SAME_STEPS = 3  # made twice
_LOGIT_TOKENS = 128  # of a row whose logits are looked at


def probe(config: Config, recipe: Recipe, plan: Plan, log: Callable[[str], None]) -> dict[str, Any]:
  """Returns what the first steps are like, all on one batch of tokens drawn uniformly."""
  rows = config.train.batch_size
  with jax.set_mesh(plan.mesh):
    put = lambda num_rows: place(plan.mesh, synthetic_batch(config, num_rows), num_rows)
    batch = put(rows)
    layout = (plan.shardings, plan.frozen_shardings)
    begin = lambda: jax.jit(make_init(config, recipe, plan.optimizer), out_shardings=layout)()
    state, frozen = begin()
    log(f"[diagnose] looking at the gradient of {config.train.micro_batch_size} sequences")
    leaves = leaf_statistics(recipe, state, frozen, put(config.train.micro_batch_size))
    few = put(batch_ways(plan.mesh.shape))
    before = logit_statistics(config, recipe.weights(state.params, frozen), few)
    begun = time.monotonic()
    step = compile_step(config, recipe, plan, state, frozen, batch)
    compile_seconds = time.monotonic() - begun
    log(f"[diagnose] train step compiled in {compile_seconds:.1f}s; {NUM_STEPS} steps on one batch")
    state, steps, updates, mark = _run(step, state, frozen, batch, recipe, plan, NUM_STEPS)
    after = logit_statistics(config, recipe.weights(state.params, frozen), few)
    del state
    _, again, _, second = _run(step, begin()[0], frozen, batch, recipe, plan, _SAME_STEPS)
  for leaf in leaves:
    leaf["update_ratio"] = updates[leaf["name"]]
  same = [a["sums"] == b["sums"] for a, b in zip(steps, again, strict=False)]
  seconds = statistics.median(each["seconds"] for each in steps[1:])
  return {
    "batch_size": rows,
    "sequence_length": config.train.sequence_length,
    "compile_seconds": compile_seconds,
    "step_seconds": seconds,
    "tokens_per_second": rows * config.train.sequence_length / seconds,
    "losses": [each["values"]["loss"] for each in steps],
    "grad_norms": [each["values"]["grad_norm"] for each in steps],
    "experts": {name: value for name, value in steps[0]["values"].items() if name.startswith("moe/")},
    "leaves": leaves,
    "logits": {"before": before, "after": after},
    "learning_rate": float(plan.schedule(0)),
    "is_deterministic": mark == second and all(same),
  }


def synthetic_batch(config: Config, num_rows: int) -> Batch:
  """Returns rows of one document each, of tokens drawn uniformly; the last token of a row has nothing to predict."""
  shape = num_rows, config.train.sequence_length
  tokens = np.random.default_rng(config.train.seed).integers(0, config.model.vocab_size, shape, dtype=np.int32)
  weights = np.ones(shape, np.float32)
  weights[:, -1] = 0
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  return Batch(tokens, np.roll(tokens, -1, axis=1), weights, Context(positions, np.ones_like(tokens)))


def _run(
  step: Callable[..., Any], state: TrainState, frozen: Any, batch: Batch, recipe: Recipe, plan: Plan, num_steps: int
) -> tuple[TrainState, list[dict[str, Any]], dict[str, float | None], list[int]]:
  """Returns the last state, what each step reported, how far the first moved each leaf, and a mark of an early state.

  The mark is of the parameters and the optimizer after the steps that are made twice.
  """
  steps, updates, mark = [], {}, []
  for number in range(1, num_steps + 1):
    old = jax.tree.map(jnp.copy, state.params) if number == 1 and num_steps == NUM_STEPS else None
    begun = time.monotonic()
    state, sums = step(state, frozen, batch)
    jax.block_until_ready(sums)
    seconds = time.monotonic() - begun
    sums = jax.device_get(sums)
    values = recipe.summarize(sums) | {"grad_norm": float(sums["grad_norm"])}
    steps.append({"seconds": seconds, "values": values, "sums": {name: x.tobytes() for name, x in sums.items()}})
    if old is not None:
      updates = _named(jax.device_get(_moved(old, state.params, _is_stacked(recipe))))
    if number == _SAME_STEPS:
      mark = [int(x) for x in jax.tree.leaves(jax.device_get(_marks((state.params, state.opt_state))))]
  return state, steps, updates, mark


def leaf_statistics(recipe: Recipe, state: TrainState, frozen: Any, batch: Batch) -> list[dict[str, Any]]:
  """Returns, of every parameter of every layer, what the gradient of the loss per token is like.

  A parameter that is stacked over the repeats of a period is one for each of them. `norm` is of the gradient,
  `rms` its root mean square, `zero_share` the share of exact zeros and `weight_norm` the norm of the parameter.
  """
  stacked = _is_stacked(recipe)

  @jax.jit
  def statistics_of(params: Parameters, batch: Batch) -> Any:
    key = jax.random.key(0)
    gradients, info = jax.grad(recipe.loss, has_aux=True)(params, frozen, batch, state.step, key)

    def one(gradient: Array, weights: Array, is_stacked: bool) -> dict[str, Array]:
      dims = tuple(range(1 if is_stacked else 0, gradient.ndim))
      gradient = gradient / jnp.maximum(info.weight, 1e-8)
      square = jnp.mean(jnp.square(gradient), axis=dims)
      return {
        "norm": jnp.sqrt(jnp.sum(jnp.square(gradient), axis=dims)),
        "rms": jnp.sqrt(square),
        "zero_share": jnp.mean(gradient == 0, axis=dims),
        "is_finite": jnp.all(jnp.isfinite(gradient), axis=dims),
        "weight_norm": jnp.sqrt(jnp.sum(jnp.square(weights), axis=dims)),
      }

    return jax.tree.map(one, gradients, params, stacked)

  found: dict[str, dict[str, Any]] = {}
  for path, values in jax.tree_util.tree_leaves_with_path(jax.device_get(statistics_of(state.params, batch))):
    *place, statistic = path
    for name, value in _named_one(place, values).items():
      found.setdefault(name, {"name": name, "component": component(place)})[statistic.key] = value
  return list(found.values())


def logit_statistics(config: Config, params: Parameters, batch: Batch) -> dict[str, float]:
  """Returns mean, deviation and extremes of the logits of a few tokens."""

  @jax.jit
  def look(params: Parameters, batch: Batch) -> dict[str, Array]:
    output = LanguageModel(config.model).apply(variables(params), batch.tokens, batch.context)
    scores = logits(output._replace(hidden=output.hidden[:, :_LOGIT_TOKENS]))
    return {"mean": scores.mean(), "std": scores.std(), "min": scores.min(), "max": scores.max()}

  return {name: float(value) for name, value in look(params, batch).items()}


def _is_stacked(recipe: Recipe) -> Any:
  """Returns, for every parameter, whether its first dim runs over the repeats of a period."""
  is_axes = lambda leaf: isinstance(leaf, tuple)
  return jax.tree.map(lambda axes: axes[:1] == ("layers",), recipe.axes, is_leaf=is_axes)


def _moved(old: Parameters, new: Parameters, stacked: Any) -> Any:
  """Returns the norm of every parameter's update over that of the parameter."""

  def one(before: Array, after: Array, is_stacked: bool) -> Array:
    dims = tuple(range(1 if is_stacked else 0, before.ndim))
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=dims))
    return norm(after - before) / norm(before)

  return jax.jit(lambda old, new: jax.tree.map(one, old, new, stacked))(old, new)


def _named(tree: Any) -> dict[str, Any]:
  found = {}
  for path, values in jax.tree_util.tree_leaves_with_path(tree):
    found |= _named_one(path, values)
  return found


def _named_one(path: Any, values: Any) -> dict[str, Any]:
  """Returns the numbers at a path by name; those of the repeats of a period end with [their number]."""
  name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
  values = np.asarray(values)
  if values.ndim == 0:
    return {name: values.item()}
  return {f"{name}[{repeat}]": value.item() for repeat, value in enumerate(values)}


@jax.jit
def _marks(tree: Any) -> Any:
  """Returns a number for each leaf that changes with any of its bits."""

  def one(x: Array) -> Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(x.ndim):
      place = place * jnp.uint32(1_000_003) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

  return jax.tree.map(one, tree)
