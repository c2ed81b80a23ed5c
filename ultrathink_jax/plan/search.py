"""Meshes, remat policies and micro-batches that fit, best first: an estimate of thousands, then a few compiled."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ultrathink_jax import patterns
from ultrathink_jax.config import Config, MeshConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.models.stack import bubble_of
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.optimizers.schedules import make_schedule
from ultrathink_jax.parallel.mesh import batch_ways, divides, make_mesh
from ultrathink_jax.parallel.sharding import partition_spec
from ultrathink_jax.plan import roofline
from ultrathink_jax.plan.collectives import Collective
from ultrathink_jax.plan.compiled import target
from ultrathink_jax.plan.flops import count_flops
from ultrathink_jax.plan.topology import Topology, axis_links
from ultrathink_jax.platform import compiling_for
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.train.preflight import memory_need
from ultrathink_jax.train.state import make_init, state_shardings
from ultrathink_jax.types import Batch, Context, Recipe, TrainState

REMAT = ("none", "dots", "named", "full")
_FIT = 0.9  # share of a chip's memory up to which an estimate is tried
_AXES = ("data", "fsdp", "expert", "context", "tensor", "pipe")


class Candidate(NamedTuple):
  """A way to run: its config, the estimated bytes and seconds of a device, and whether that would fit."""

  config: Config
  memory_bytes: int
  seconds: float
  is_fit: bool


@dataclasses.dataclass(frozen=True)
class _Cost:
  """What one sequence costs under a remat policy, on one device and without a mesh."""

  activation_bytes: int
  flops: int


def candidates(config: Config, topology: Topology, devices: list[Any]) -> list[Candidate]:
  """Returns every way to run `config` on `devices`, those that fit by the estimate first, fastest first."""
  recipe = find_recipe(config)
  with compiling_for(target(topology)):
    costs = {remat: _cost(config, remat) for remat in REMAT}
  leaves = _leaves(recipe, config)
  found = []
  for mesh_config in _meshes(config, topology):
    try:
      on_mesh = dataclasses.replace(config, mesh=mesh_config)
      mesh = make_mesh(_least(on_mesh), devices)
    except ConfigError:
      continue
    estimate = _estimator(topology, mesh, leaves, costs)
    for steps, remat in itertools.product(_divisors(config.train.batch_size), REMAT):
      changed = _changed(on_mesh, remat, steps)
      if divides(changed, dict(mesh.shape)):
        found.append(estimate(changed))
  return sorted(found, key=lambda each: (not each.is_fit, each.seconds if each.is_fit else each.memory_bytes))


def best_distinct(found: list[Candidate], count: int) -> list[Candidate]:
  """Returns up to `count` of the first candidates, each on a mesh of its own, so that a wrong estimate costs one."""
  best: dict[MeshConfig, Candidate] = {}
  for each in found:
    best.setdefault(each.config.mesh, each)
  return list(best.values())[:count]


def _meshes(config: Config, topology: Topology) -> Iterator[MeshConfig]:
  """Yields every way to split the devices of a slice over the axes."""
  each = topology.num_devices // topology.slices

  def split(rest: int, axes: int) -> Iterator[tuple[int, ...]]:
    if axes == 1:
      yield (rest,)
      return
    for size in _divisors(rest):
      for others in split(rest // size, axes - 1):
        yield (size, *others)

  for sizes in split(each, len(_AXES)):
    yield dataclasses.replace(config.mesh, **dict(zip(_AXES, sizes, strict=True)))


def _divisors(number: int) -> list[int]:
  return [k for k in range(1, number + 1) if number % k == 0]


def _changed(config: Config, remat: str, accumulation_steps: int) -> Config:
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, remat=remat),
    train=dataclasses.replace(config.train, accumulation_steps=accumulation_steps),
  )


def _least(config: Config) -> Config:
  """Returns the config with as few micro-batches as there can be, so that only the model may not divide."""
  return _changed(config, config.model.remat, 1)


def _cost(config: Config, remat: str) -> _Cost:
  """Returns what one sequence of `config` costs, from tracing one."""
  alone = dataclasses.replace(
    config, mesh=dataclasses.replace(config.mesh, slices=1, **dict.fromkeys(_AXES, 1)),
    train=dataclasses.replace(config.train, batch_size=1, accumulation_steps=1),
    model=dataclasses.replace(config.model, remat=remat),
  )  # fmt: skip
  recipe = find_recipe(alone)
  mesh = make_mesh(alone, jax.devices("cpu")[:1])
  state, shardings = _state(recipe, alone, mesh)
  shape = 1, alone.train.sequence_length
  of = lambda dtype: jax.ShapeDtypeStruct(shape, dtype)
  batch = Batch(of(jnp.int32), of(jnp.int32), of(jnp.float32), Context(of(jnp.int32), of(jnp.int32)))
  gradient = lambda params, batch: jax.grad(recipe.loss, has_aux=True)(
    params, None, batch, jnp.zeros((), jnp.int32), jax.random.key(0)
  )
  flops = count_flops(jax.make_jaxpr(gradient)(state.params, batch))
  return _Cost(memory_need(alone, recipe, state, shardings).activations, flops)


def _state(recipe: Recipe, config: Config, mesh: Mesh) -> tuple[TrainState, TrainState]:
  optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.steps))
  state, _ = jax.eval_shape(make_init(config, recipe, optimizer))
  return state, state_shardings(config, mesh, recipe, optimizer, state)


class _Leaf(NamedTuple):
  bytes: int
  repeats: int  # periods that it is stacked over
  axes: tuple[str | None, ...]  # of the mesh, as fully sharded


def _leaves(recipe: Recipe, config: Config) -> list[_Leaf]:
  params, _ = jax.eval_shape(recipe.init, jax.random.key(0))
  leaves = []

  def add(leaf, axes):
    repeats = leaf.shape[0] if axes[0] == "layers" else 1
    leaves.append(_Leaf(leaf.size * leaf.dtype.itemsize, repeats, tuple(partition_spec(axes))))

  jax.tree.map(add, params, recipe.axes)
  return leaves


def _estimator(
  topology: Topology, mesh: Mesh, leaves: list[_Leaf], costs: dict[str, _Cost]
) -> Callable[[Config], Candidate]:
  """Returns (config on `mesh`) -> its candidate."""
  sizes, links = mesh.shape, axis_links(topology, mesh)
  ways = batch_ways(sizes)
  share = lambda leaf, without=(): leaf.bytes / math.prod(sizes[a] for a in leaf.axes if a and a not in without)
  sharded = sum(share(leaf) for leaf in leaves)
  whole = sum(share(leaf, ("fsdp",)) for leaf in leaves)  # of one device, once gathered
  largest = max(share(leaf, ("fsdp", "pipe")) / leaf.repeats for leaf in leaves)

  def estimate(config: Config) -> Candidate:
    train, zero, cost = config.train, config.mesh.zero, costs[config.model.remat]
    rows = train.micro_batch_size / ways
    parameters = sharded if zero == 3 else whole
    gradients = (whole if zero == 1 else sharded) * (2 if train.accumulation_steps > 1 else 1)
    moments = 0 if config.optimizer.offload else 2 * sharded
    activations = cost.activation_bytes * rows / sizes["context"] / sizes["pipe"]
    memory = parameters + gradients + moments + activations + 2 * largest
    flops = cost.flops * train.batch_size / mesh.size
    traffic = 8 * sharded + train.accumulation_steps * (6 * whole / 2 + 3 * activations)
    exchange = _exchange(config, sizes, sharded, whole)
    bubble = bubble_of(config.model, train.micro_batch_size, mesh.shape)
    times = roofline.roofline(topology, links, flops, traffic, exchange, bubble)
    return Candidate(config, round(memory), times.serial, memory <= _FIT * topology.chip.memory_bytes)

  return estimate


def _exchange(config: Config, sizes: Any, sharded: float | int, whole: float | int) -> list[Collective]:
  """Returns what a step exchanges, by what each axis is for: bytes are of one device."""
  model, train = config.model, config.train
  item, repeats = (2 if model.dtype == "bfloat16" else 4), train.accumulation_steps
  ways = batch_ways(sizes) * sizes["context"]
  tokens = train.batch_size * train.sequence_length / ways  # of one device in a step
  passes = 2 if model.remat == "none" else 3  # forward, backward, forward again
  letters = _letters(config)
  per_device = lambda count: count / sizes["pipe"]
  found = []

  def add(kind: str, axis: str, size: float | int, count: float | int = 1) -> None:
    if sizes[axis] > 1:
      found.append(Collective(kind, (axis,), sizes[axis], round(size * count), 1, False, "", ""))

  add("all-gather", "fsdp", whole * item / 4, 2 * repeats if config.mesh.zero == 3 else 1)
  add("reduce-scatter", "fsdp", whole, repeats)
  add("all-reduce", "data", sharded)
  rows = tokens * model.embed_dim * item
  add("all-reduce", "tensor", rows, passes * per_device(sum(letters.values())))
  routed = rows * model.experts_per_token * (model.capacity_factor or model.expert_buffer_factor)
  add("all-to-all", "expert", routed, 2 * passes * per_device(letters.get("E", 0)))
  keys = 2 * tokens * sizes["context"] * model.num_kv_heads * model.head_dim * item / sizes["tensor"]
  add("all-gather", "context", keys, passes * per_device(letters.get("A", 0) + letters.get("L", 0)))
  add("collective-permute", "pipe", rows, passes)
  return found


def _letters(config: Config) -> dict[str, int]:
  """Returns how many layers of each letter the model has."""
  spelled = patterns.spell(patterns.parse(config.model.layers, "ALMFE"))
  return {letter: spelled.count(letter) for letter in set(spelled)}
