"""A group of layers as one scan over its periods, with weights gathered ahead, or as a pipeline of them.

Letters: B batch  T length  D embed  R repeats of a period  M micro-batches  k periods of a stage.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.kernels.names import CUDNN_ATTENTION, KERNEL_OUTPUT
from ultrathink_jax.layers.linear import ADAPTERS, PROJECTED, QUANTIZED
from ultrathink_jax.layers.mamba import SCAN_LOSS
from ultrathink_jax.layers.router import ROW_LOSSES
from ultrathink_jax.models.layer import LAYER_OUTPUT, Period, groups
from ultrathink_jax.parallel.devices import scan_unroll
from ultrathink_jax.parallel.mesh import BATCH_AXES, axis_size, batch_ways
from ultrathink_jax.parallel.pipeline import bubble_share, join, pipeline
from ultrathink_jax.parallel.prefetch import scan_gathering_ahead
from ultrathink_jax.parallel.sharding import constrain_tree
from ultrathink_jax.patterns import Group
from ultrathink_jax.types import Context

_policies = jax.checkpoint_policies
_named_products = _policies.save_only_these_names(LAYER_OUTPUT, PROJECTED, KERNEL_OUTPUT)


def _keep_products(primitive: jax.extend.core.Primitive, *arrays: Any, **params: Any) -> bool:
  """Keeps what projections, kernels and whole layers return: the rest is cheap to compute again."""
  return CUDNN_ATTENTION in primitive.name or _named_products(primitive, *arrays, **params)


# What the backward pass finds of a period's forward pass beside its input; the rest it computes again.
REMAT: dict[str, Callable[..., Any] | None] = {
  "full": None,
  "named": _policies.save_only_these_names(LAYER_OUTPUT),
  "dots": _keep_products,
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[LAYER_OUTPUT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


def scanned(group: Group, config: ModelConfig, is_recomputed: bool, name: str) -> nn.Module:
  """Returns the module (x, caches, context) -> (x, (caches, aux, taps)) of a group, one period after another.

  `is_recomputed` says whether there is a backward pass that the remat policy is for.
  """
  period = nn.remat(Period, prevent_cse=False, policy=REMAT[config.remat]) if is_recomputed else Period
  stack = nn.scan(
    period,
    variable_axes={"params": 0, ADAPTERS: 0, QUANTIZED: 0},
    split_rngs={"params": True, "router": True, ADAPTERS: True},
    in_axes=(0, nn.broadcast),
    length=group.repeats,
    unroll=min(group.repeats, config.unroll or scan_unroll(group.repeats)),
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return stack(group.letters, config, name=name)


def num_micro_batches(config: ModelConfig, batch_size: int, ways: int) -> int:
  """Returns into how many parts stages split `batch_size` rows that lie over `ways` devices."""
  return config.pipe_micro_batches or max(1, batch_size // ways)


def rounds_of(groups: Sequence[Group]) -> list[list[int]]:
  """Returns the numbers of the groups that pass through the stages as rounds of one pipeline: equal ones in a row."""
  runs: list[list[int]] = []
  for number, group in enumerate(groups):
    if runs and groups[runs[-1][-1]] == group:
      runs[-1].append(number)
    else:
      runs.append([number])
  return runs


def bubble_of(config: ModelConfig, batch_size: int, mesh: Mapping[str, int]) -> float:
  """Returns the share of their time that stages wait in a pass of `batch_size` rows, over the layers of all groups."""
  ways = batch_ways(mesh)
  stages, micro_batches = mesh["pipe"], num_micro_batches(config, batch_size, ways)
  all_groups, waited, total = groups(config), 0.0, 0.0
  for run in rounds_of(all_groups):
    rounds = len(run) if micro_batches >= stages else 1
    busy = sum(len(all_groups[number].letters) * all_groups[number].repeats for number in run)
    time = busy / (1 - bubble_share(stages, micro_batches, rounds))
    waited, total = waited + time - busy, total + time
  return waited / total


def gathers_ahead(group: Group, config: ModelConfig) -> bool:
  """Returns whether the weights of a group are gathered a period ahead on the mesh that is set."""
  return config.gather_ahead and group.repeats > 1 and axis_size("fsdp") > 1


def gathered_ahead(
  group: Group,
  config: ModelConfig,
  params: Any,
  x: Float[Array, "B T D"],
  context: Context,
  key: Key[Array, ""] | None,
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
  """Returns x after the group whose stacked parameters are `params`, and the aux values, as a scan gives them."""
  period, run_period = Period(group.letters, config), _period(group, config)
  boxed = jax.eval_shape(
    lambda: period.init({"params": jax.random.key(0), "router": jax.random.key(0)}, x, None, context)
  )
  axes = jax.tree.map(
    lambda leaf: leaf.names, boxed["params"], is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
  )

  def gather(weights: Any) -> Any:
    weights = jax.tree_util.tree_map_with_path(partial(_as_used, jnp.dtype(config.dtype)), weights)
    return constrain_tree(weights, axes, is_over_fsdp=False)

  def scatter(gradient: Any) -> Any:
    return constrain_tree(jax.tree.map(lambda g: g.astype(jnp.float32), gradient), axes, is_over_fsdp=True)

  def settle(gradients: Any) -> Any:
    stacked = jax.tree.map(lambda names: ("layers", *names), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return constrain_tree(gradients, stacked, is_over_fsdp=True)

  run = lambda weights, *rest: run_period({"params": weights}, *rest)
  keys = jax.random.split(jax.random.key(0) if key is None else key, group.repeats)
  return scan_gathering_ahead(run, gather, scatter, settle, params, x, keys, context)


def pipelined(
  group: Group,
  config: ModelConfig,
  rounds: Sequence[Any],
  x: Float[Array, "B T D"],
  context: Context,
  key: Key[Array, ""] | None,
) -> tuple[Float[Array, "B T D"], list[dict[str, Any]]]:
  """Returns x after the groups whose variables are `rounds`, and the aux values of each, as a scan gives them.

  Noise on routers is drawn for each micro-batch by itself.
  """
  ways = batch_ways({axis: axis_size(axis) for axis in BATCH_AXES})
  micro_batches = num_micro_batches(config, x.shape[0], ways)
  noise = context.router_noise
  run_period = _period(group, config)

  def stage(variables: Any, x: Array, rows: Context, key: Key[Array, ""]) -> tuple[Array, Any]:
    num_periods = jax.tree.leaves(variables)[0].shape[0]
    keys, rows = jax.random.split(key, num_periods), rows._replace(router_noise=noise)
    return jax.lax.scan(lambda x, each: run_period(each[0], x, each[1], rows), x, (variables, keys))

  if len(rounds) > 1 and micro_batches < axis_size("pipe"):  # stage 0 would wait for the last one: no round saves time
    aux = []
    for number, variables in enumerate(rounds):
      one_key = None if key is None else jax.random.fold_in(key, number)
      x, one = pipelined(group, config, [variables], x, context, one_key)
      aux += one
    return x, aux
  rows = context._replace(router_noise=None)
  x, aux = pipeline(stage, rounds, x, rows, micro_batches, jax.random.key(0) if key is None else key)
  return x, [{layer: _whole_batch(values) for layer, values in one.items()} for one in aux]


def _period(group: Group, config: ModelConfig) -> Callable[[Any, Array, Key[Array, ""], Context], tuple[Array, Any]]:
  """Returns (variables of a period, x, key of its noise, context) -> (x, aux), recomputed as the remat policy says."""
  period = Period(group.letters, config)

  def run(variables: Any, x: Array, key: Key[Array, ""], context: Context) -> tuple[Array, Any]:
    rngs = {} if context.router_noise is None else {"router": key}
    x, (_, aux, _) = period.apply(variables, x, None, context, rngs=rngs)
    return x, aux

  return run if config.remat == "none" else jax.checkpoint(run, prevent_cse=False, policy=REMAT[config.remat])


def _as_used(dtype: jnp.dtype, path: tuple, weight: Array) -> Array:
  """Returns a parameter as its layer uses it: kernels, but those of routers, in the dtype of activations."""
  names = [entry.key for entry in path]
  is_cast = names[-1] == "kernel" and not names[-2].endswith("router")
  return weight.astype(dtype) if is_cast else weight


def _whole_batch(values: dict[str, Array]) -> dict[str, Array]:
  """Returns the aux values [R, M, ...] of a layer as they are for a whole batch: rows side by side, counts summed."""
  rows, by_row = lambda array: jax.vmap(join)(array), (*ROW_LOSSES, SCAN_LOSS)
  return {name: rows(value) if name in by_row else jnp.sum(value, axis=1) for name, value in values.items()}
