import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.conftest import packed_context, tiny_model
from ultrathink_jax.models.layer import MIXERS

GROUPED = {"router": "grouped", "expert_groups": "many=2,one=1,single=1"}
ROUTERS = [{"router": "softmax"}, {"router": "sigmoid", "router_bias": True}, GROUPED]


def moe(context, **changes):
  module = MIXERS["E"].module(tiny_model(**changes))
  x = jax.random.normal(jax.random.key(1), (*context.positions.shape, 32))
  return module, x, plain(jax.jit(module.init)(jax.random.key(0), x, context, None)["params"])


def plain(tree):
  return jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), tree, is_leaf=lambda leaf: hasattr(leaf, "value"))


def test_parameters_have_the_names_that_files_use():
  _, _, params = moe(packed_context(8), **GROUPED, router_bias=True, shared_expert_dim=16)
  names = {
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }
  banks = {f"{name}/kernel" for name in ("gate", "up", "down", "shared/gate", "shared/up", "shared/down")}
  assert names == banks | {"router/kernel", "group_router/kernel", "router_bias"}


def test_load_counts_the_choices_of_tokens_and_not_of_padding():
  module, x, params = moe(packed_context(5, -3))
  _, _, aux = module.apply({"params": params}, x, packed_context(5, -3), None)
  assert float(aux["load"].sum()) == 5 * 2
  assert float(aux["dropped"]) == 0


def test_a_tight_capacity_drops_and_counts_and_a_loose_one_equals_none():
  context = packed_context(64)
  module, x, params = moe(context, capacity_factor=0.5)
  y, _, aux = module.apply({"params": params}, x, context, None)
  assert float(aux["dropped"]) >= 64
  full, _, _ = moe(context)[0].apply({"params": params}, x, context, None)
  assert float(jnp.abs(y - full).max()) > 0.01
  loose, _, aux = moe(context, capacity_factor=4.0)[0].apply({"params": params}, x, context, None)
  assert float(aux["dropped"]) == 0
  np.testing.assert_allclose(loose, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("router", ROUTERS[:2])
def test_experts_can_be_permuted(router, capacity_factor):
  context = packed_context(16)
  module, x, params = moe(context, capacity_factor=capacity_factor, **router)
  order = np.array([2, 0, 3, 1])
  if "router_bias" in params:
    params["router_bias"] = jnp.array([0.0, 0.2, 0.1, -0.1])
  permuted = jax.tree.map(lambda leaf: leaf[order], params) | {
    "router": {"kernel": params["router"]["kernel"][:, order]}
  }
  y, _, _ = module.apply({"params": params}, x, context, None)
  z, _, _ = module.apply({"params": permuted}, x, context, None)
  np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_a_shared_expert_adds_what_every_token_gets_from_it(activation):
  context = packed_context(16)
  module, x, params = moe(context, shared_expert_dim=24, mlp_activation=activation)
  y, _, _ = module.apply({"params": params}, x, context, None)
  routed, _, _ = moe(context, mlp_activation=activation)[0].apply({"params": params}, x, context, None)
  up, down = (np.asarray(params["shared"][name]["kernel"], np.float64) for name in ("up", "down"))
  hidden = np.maximum(x @ up, 0) ** 2
  if activation == "swiglu":
    gate = x @ np.asarray(params["shared"]["gate"]["kernel"], np.float64)
    hidden = gate / (1 + np.exp(-gate)) * (x @ up)
  np.testing.assert_allclose(y - routed, hidden @ down, rtol=1e-4, atol=1e-5)
  assert float(jnp.abs(y - routed).max()) > 0.01


def test_experts_without_a_gate_equal_their_formula():
  context = packed_context(8)
  module, x, params = moe(context, mlp_activation="relu2", experts_per_token=4, router_multiplier=2.0)
  y, _, _ = module.apply({"params": params}, x, context, None)
  scores = np.exp(np.asarray(x @ params["router"]["kernel"], np.float64))
  gates = 2 * scores / scores.sum(-1, keepdims=True)
  up, down = (np.asarray(params[name]["kernel"], np.float64) for name in ("up", "down"))
  hidden = np.maximum(np.einsum("btd,edf->btef", x, up), 0) ** 2
  np.testing.assert_allclose(y, np.einsum("btef,efd,bte->btd", hidden, down, gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deviation", [None, 1.0])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_output_has_a_gradient_for_every_router_weight_that_matters(router, deviation):
  context = packed_context(32)._replace(router_noise=None if deviation is None else jnp.float32(deviation))
  module, x, params = moe(packed_context(32), **router)
  rngs = {} if deviation is None else {"router": jax.random.key(3)}

  def loss(params):
    return jnp.sum(jnp.square(module.apply({"params": params}, x, context, None, rngs=rngs)[0]))

  gradients = jax.jit(jax.grad(loss))(params)
  choices = 2 if router is GROUPED else 4  # an expert alone in its group is chosen with the group
  for name, columns in (("router", choices), ("group_router", 3)):
    if name in gradients:
      assert (jnp.abs(gradients[name]["kernel"][:, :columns]).max(axis=0) > 1e-6).all()
  if "router_bias" in gradients:
    assert not gradients["router_bias"].any()


def test_without_a_deviation_routing_needs_no_random_numbers_and_with_one_it_follows_them():
  context = packed_context(64)
  module, x, params = moe(context)
  quiet = module.apply({"params": params}, x, context, None)[0]
  noisy = lambda deviation, seed: module.apply(
    {"params": params},
    x,
    context._replace(router_noise=jnp.float32(deviation)),
    None,
    rngs={"router": jax.random.key(seed)},
  )[0]
  np.testing.assert_allclose(noisy(0.0, 0), quiet, rtol=1e-6)
  assert float(jnp.abs(noisy(1.0, 0) - quiet).max()) > 0.01
  assert float(jnp.abs(noisy(1.0, 0) - noisy(1.0, 1)).max()) > 0.01


def test_stages_of_a_pipeline_run_recomputed_scanned_experts_over_a_mesh_as_one_device_runs_them():
  context = packed_context(6, -2, batch=4)
  module, _, params = moe(context, experts_backend="sorted", mlp_activation="relu2")
  scales = 1 + 0.1 * jnp.arange(4.0).reshape(2, 2)  # of two layers on each of two stages
  params = jax.tree.map(lambda leaf: scales.reshape(2, 2, *[1] * leaf.ndim) * leaf, params)
  x = jax.random.normal(jax.random.key(1), (2, 4, 8, 32))

  def stage(params, x):
    @jax.checkpoint
    def layer(x, params):
      y, _, aux = module.apply({"params": params}, x, context, None)
      return x + y, aux

    return jax.lax.scan(layer, x, params)

  def loss(params, x, stages):
    y, aux = stages(stage)(params, x)
    return jnp.sum(jnp.sin(y)) + sum(jnp.sum(aux[name]) for name in ("load_balance", "router_z")), (y, aux)

  def step(stages):
    return jax.jit(lambda params, x: jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, stages))

  one_device = step(jax.vmap)(params, x)
  axes = ("data", "fsdp", "expert", "context", "tensor", "pipe")
  with jax.set_mesh(jax.make_mesh((1, 2, 2, 1, 1, 2), axes, axis_types=(AxisType.Auto,) * 6)):
    piped = step(lambda stage: jax.vmap(stage, spmd_axis_name="pipe"))(params, x)
  for ours, expected in zip(jax.tree.leaves(piped), jax.tree.leaves(one_device), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
