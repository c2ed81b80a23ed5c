"""Rows split over the context axis give what one device gives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.conftest import packed_context, tiny_model
from ultrathink_jax.config import LossConfig
from ultrathink_jax.kernels import attention_blockwise as blockwise
from ultrathink_jax.kernels import cross_entropy_chunked as chunked
from ultrathink_jax.kernels.attention import Scoring, attention
from ultrathink_jax.kernels.backends import ATTENTION
from ultrathink_jax.losses.language_modeling import language_modeling_loss
from ultrathink_jax.models.language_model import LanguageModel, init_params
from ultrathink_jax.models.layer import Layer
from ultrathink_jax.types import Batch, Context

T = 32
# On four shards borders are at 8, 16 and 24. Documents cross them, begin at them, span shards and end in padding.
ROWS = [(5, 11, 4, 9, -3), (T,), (8, 8, 8, 8), (1, 17, -6, 8)]
AXES = ("data", "fsdp", "expert", "context", "tensor", "pipe")


def rows_of(documents) -> Context:
  rows = [packed_context(*row) for row in documents]
  return Context(*(jnp.concatenate(arrays) for arrays in zip(*(row[:2] for row in rows), strict=True)))


def mesh_of(**sizes):
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[: math.prod(shape)])


def gradients(module, params, x, context):
  """Returns the outputs of a layer and the gradients of their sum with random weights."""
  loss = lambda params, x: weigh(module, params, x, context)
  (_, y), of_arguments = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
  return {"y": y, "params": of_arguments[0], "x": of_arguments[1]}


def weigh(module, params, x, context):
  y = module.apply({"params": params}, x, context, None)[0]
  return jnp.sum(y * jax.random.normal(jax.random.key(2), y.shape)), y


def inputs(module, context):
  x = jax.random.normal(jax.random.key(1), (*context.positions.shape, 32))
  params = jax.jit(module.init)(jax.random.key(0), x, context, None)["params"]
  # Larger weights and a sink that matters, so that a wrong path shows.
  return jax.tree.map(
    lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf + 0.3, jax.tree.map(jnp.asarray, unbox(params))
  ), x


def unbox(params):
  return jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), params, is_leaf=lambda leaf: hasattr(leaf, "value"))


@functools.cache
def on_one_device(letter, changes):
  module = Layer(letter, tiny_model(**dict(changes) | {"attention_backend": "reference", "ssd_backend": "reference"}))
  context = rows_of(ROWS)
  params, x = inputs(module, context)
  return params, x, jax.device_get(gradients(module, params, x, context))


def assert_equal(ours, plain, tolerance=1e-5):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True):
    scale = max(1.0, float(np.abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def check(letter, sizes, **changes):
  choices = {key: changes.pop(key) for key in ("attention_backend", "ssd_backend") if key in changes}
  params, x, plain = on_one_device(letter, tuple(sorted(changes.items())))
  module = Layer(letter, tiny_model(**changes | choices))
  with jax.set_mesh(mesh_of(**sizes)):
    assert_equal(gradients(module, params, x, rows_of(ROWS)), plain)


SIZES = [{"context": 4, "tensor": 2}, {"context": 8}, {"context": 2, "fsdp": 4}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_over_context_equals_one_device(sizes):
  check("A", sizes, attention_soft_cap=2.0, attention_sinks=True, num_kv_heads=2)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mamba_over_context_equals_one_device(sizes):
  check("M", sizes)


@pytest.mark.parametrize("window_tokens", [9, 11])
def test_windows_smaller_and_larger_than_a_shard(window_tokens):
  check("L", {"context": 4}, window_tokens=window_tokens, attention_sinks=True)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_groups_of_mamba_heads_lie_over_tensor(num_groups):
  check("M", {"context": 2, "tensor": 4}, mamba_num_groups=num_groups)


@pytest.mark.parametrize(
  ("letter", "backend"), [("A", "reference"), ("A", "pallas"), ("L", "pallas"), ("M", "reference"), ("M", "pallas")]
)
def test_every_backend_runs_on_a_mesh(letter, backend):
  key = "ssd_backend" if letter == "M" else "attention_backend"
  check(letter, {"data": 2, "context": 2, "tensor": 2}, window_tokens=13, **{key: backend})


@pytest.mark.parametrize("backend", ["blockwise", "pallas"])
@pytest.mark.parametrize("scoring", [Scoring(0.5), Scoring(0.5, 0.7, 11)])
def test_queries_may_lie_anywhere_among_the_keys(backend, scoring, monkeypatch):
  monkeypatch.setattr(blockwise, "_BLOCK_TOKENS", 8)
  context = packed_context(30, 23, 40, -3, batch=2)
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, length, heads: jax.random.normal(key, (2, length, heads, 8))
  key, value = draw(keys[1], 96, 2), draw(keys[2], 96, 2)
  for start, length in ((0, 16), (37, 21)):
    query, tokens = draw(keys[0], length, 4), slice(start, start + length)
    where = (context.positions[:, tokens], context.positions, context.segment_ids[:, tokens], context.segment_ids)

    def outputs(function, query=query, where=where, start=start):
      loss = lambda *arrays: jnp.sum(jnp.sin(function(*arrays[:3], *where, scoring, arrays[3], start)))
      return jax.jit(jax.value_and_grad(loss, argnums=range(4)))(query, key, value, jnp.arange(4.0))

    assert_equal(outputs(ATTENTION[backend]), outputs(attention))


def jaxprs_in(jaxpr):
  yield jaxpr
  for equation in jaxpr.eqns:
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr") or hasattr(leaf, "eqns")
    ):
      if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
        yield from jaxprs_in(getattr(inner, "jaxpr", inner))


def switches_in(program):
  return [
    equation for inner in jaxprs_in(program.jaxpr) for equation in inner.eqns if equation.primitive.name == "cond"
  ]


def products(jaxpr) -> int:
  """Returns the multiplications of all matrix products."""
  total = 0
  for inner in jaxprs_in(jaxpr):
    for equation in inner.eqns:
      if equation.primitive.name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        sizes = equation.invars[0].aval.shape
        total += math.prod(equation.outvars[0].aval.shape) * math.prod(sizes[dim] for dim in contracted)
  return total


def long_layer(length, **changes):
  module = Layer("A", tiny_model(**changes))
  context = packed_context(length, batch=2)
  params, x = inputs(module, context)
  return lambda params, x: gradients(module, params, x, context), params, x


def test_work_is_balanced_and_no_device_holds_the_scores_of_the_whole_sequence():
  length, shards = 512, 4
  function, params, x = long_layer(length)
  with jax.set_mesh(mesh_of(context=shards)):
    jaxpr = jax.make_jaxpr(function)(params, x)
    switches = switches_in(jaxpr)
    assert len(switches) == 2  # forward and backward
    for switch in switches:
      branches = switch.params["branches"]
      work = {products(branch.jaxpr) for branch in branches}
      assert len(branches) == shards
      assert len(work) == 1
      assert work.pop() > 0
    program = jax.jit(function).lower(params, x).compile()
    largest = max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", program.as_text()))
  # Two rows of four heads; half a shard's queries and, at most, all keys.
  assert largest <= 2 * 4 * (length // shards // 2) * length


def test_branches_share_what_they_keep_for_the_backward_pass():
  function, params, x = long_layer(512)
  kept = []
  for shards in (2, 8):
    with jax.set_mesh(mesh_of(context=shards)):
      kept.append(len(switches_in(jax.make_jaxpr(function)(params, x))[0].outvars))
  assert kept[0] == kept[1]


@pytest.mark.parametrize("letter", ["A", "M"])
def test_layers_side_by_side_in_a_pipeline_stay_apart(letter):
  params, x, plain = on_one_device(letter, ())
  module, context = Layer(letter, tiny_model()), rows_of(ROWS)
  stack = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), tree)
  loss = jax.checkpoint(lambda params, x: weigh(module, params, x, context)[0])
  total = lambda params, x: jnp.sum(jax.vmap(loss, spmd_axis_name="pipe")(params, x))

  with jax.set_mesh(mesh_of(context=4, pipe=2)):
    step = jax.jit(jax.grad(total, argnums=(0, 1)))
    ours = step(stack(params), stack(x))
    text = step.lower(stack(params), stack(x)).compile().as_text()
  assert_equal(jax.tree.map(lambda leaf: leaf[0], ours), (plain["params"], plain["x"]))
  if letter == "A":
    assert " conditional(" in text


@pytest.mark.slow
def test_a_whole_model_has_the_gradient_of_one_device():
  config = tiny_model()
  params, context = init_params(config, jax.random.key(0)), rows_of(ROWS)
  tokens = jax.random.randint(jax.random.key(1), (4, T), 0, 64)
  batch = Batch(tokens, jnp.roll(tokens, -1, 1), (context.segment_ids > 0).astype(jnp.float32), context)
  weights = LossConfig(0.01, 0.001, 0.0, 0.0)
  loss = lambda params: language_modeling_loss(
    LanguageModel(config).apply({"params": params}, tokens, context), batch, weights
  )[0]
  plain = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
  with jax.set_mesh(mesh_of(context=4)):
    assert_equal(jax.jit(jax.value_and_grad(lambda params: loss(params)))(params), plain)


def test_each_chunk_of_the_loss_has_an_equal_part_of_every_shard(monkeypatch):
  times = jnp.arange(T)[None]
  with jax.set_mesh(mesh_of(context=4)):
    chunks = chunked._split(times, 8)
    np.testing.assert_array_equal(np.sort(chunks // 8, axis=-1), np.tile(np.repeat(np.arange(4), 2), (4, 1, 1)))
    np.testing.assert_array_equal(chunked._join(chunks), times)
    monkeypatch.setattr(chunked, "_MAX_CHUNK_LOGITS", 1)
    assert chunked.chunk_length(1, T, 64) == 4
  assert chunked.chunk_length(1, T, 64) == 1
