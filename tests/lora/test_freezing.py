"""What is frozen is in no tree that is differentiated, and stays what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lora.adapted_runs import base, batch, begin, loss_and_gradient, make
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels.quantized import Quantized
from ultrathink_jax.lora.freezing import find_trained
from ultrathink_jax.models.naming import leaf_at, places
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.train.state import make_init
from ultrathink_jax.train.step import make_train_step


def trained_names(*patterns):
  """Returns the names of what is trained, with the experts where it is some of them."""
  model = make().model
  found = {each.path: each for each in find_trained(model, patterns)}
  names = {}
  for name, place in places(model, base()).items():
    each = found.get(place.path)
    if each and (each.repeats is None or place.repeat in each.repeats):
      names[name] = each.experts
  return names


def test_patterns_choose_layers_heads_and_every_other_expert():
  assert set(trained_names("head")) == {"unembedding.kernel", "final_norm.scale"}
  assert {name.split(".")[1] for name in trained_names("last:2")} == {"6", "7"}
  assert set(trained_names("router")) == {"layers.3.moe.router.kernel", "layers.7.moe.router.kernel"}
  assert set(trained_names("experts:2").values()) == {(0, 2)}
  assert set(trained_names("experts:2", "experts").values()) == {None}
  assert "layers.0.mamba.a_log" in trained_names("layers.0.mamba.*")
  assert {name.split(".")[-2] for name in trained_names("norms")} >= {"norm", "final_norm"}


@pytest.mark.parametrize(("pattern", "said"), [("heads", "head"), ("last:9", "8 layers"), ("layers.9.*", "matches no")])
def test_a_pattern_that_matches_nothing_is_refused(pattern, said):
  with pytest.raises(ConfigError, match=said):
    find_trained(make().model, [pattern])


@pytest.mark.parametrize(
  "sections",
  [
    {"train": {"trainable": ("last:3", "experts:2")}},
    {"lora": {"rank": 2}, "train": {"trainable": ("router", "layers.1.norm.*")}},
  ],
  ids=["parts of stacks", "beside adapters"],
)
def test_a_step_changes_what_is_trained_and_nothing_else(sections):
  config = make(**sections)
  recipe, params, frozen = begin(config)
  optimizer = make_optimizer(config.optimizer, lambda step: 1e-2)
  state, _ = jax.jit(make_init(config, recipe, optimizer))(base())
  sizes = {leaf.shape for leaf in jax.tree.leaves(params)}
  moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert set(moments) == sizes
  step = jax.jit(make_train_step(config, recipe, optimizer))
  for _ in range(2):
    state, _ = step(state, frozen, batch())
  before, after = recipe.weights(params, frozen).params, recipe.weights(state.params, frozen).params
  chosen = trained_names(*config.train.trainable)
  for name, place in places(config.model, before).items():
    pick = lambda tree, place=place: (
      leaf_at(tree, place.path) if place.repeat is None else leaf_at(tree, place.path)[place.repeat]
    )
    old, new, first = np.asarray(pick(before)), np.asarray(pick(after)), np.asarray(pick(base()))
    np.testing.assert_array_equal(old, first)
    if name not in chosen:
      np.testing.assert_array_equal(new, old, err_msg=name)
    elif chosen[name] is None:
      assert (new != old).any(), name
    else:
      others = [e for e in range(len(old)) if e not in chosen[name]]
      np.testing.assert_array_equal(new[others], old[others])
      assert (new[list(chosen[name])] != old[list(chosen[name])]).any()


def test_training_everything_by_patterns_is_training_everything():
  config = make(train={"trainable": ("*",)})
  recipe, params, frozen = begin(config)
  assert not jax.tree.leaves(frozen)
  loss, gradients = loss_and_gradient(recipe, params, frozen)
  whole = make()
  from ultrathink_jax.recipes import find_recipe

  expected, of_all = loss_and_gradient(find_recipe(whole), base(), None)
  np.testing.assert_array_equal(loss, expected)
  jax.tree.map(np.testing.assert_array_equal, gradients["trained"], of_all)


@pytest.mark.parametrize(
  ("dtype", "closeness"),
  [
    ("int8", 0.02),
    ("nf4", 0.2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bfloat16", 0.02), ("int4", 0.2))),
  ],
)
def test_a_base_in_few_bits_is_nearly_the_base(dtype, closeness):
  config = make({"rank": 4, "base_dtype": dtype, "targets": ("all", "router")})
  recipe, params, frozen = begin(config)
  loss, gradients = loss_and_gradient(recipe, params, frozen)
  from ultrathink_jax.recipes import find_recipe

  expected, _ = loss_and_gradient(find_recipe(make()), base(), None)
  assert 0 < abs(float(loss - expected)) < closeness * float(expected)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  kernels = jax.tree.leaves(frozen.quantized, is_leaf=lambda x: isinstance(x, Quantized))
  assert len(kernels) == (0 if dtype == "bfloat16" else 16)
  router = frozen.params["group_0"]["moe_3"]["mixer"]["router"]["kernel"]
  assert router.dtype == jnp.float32
  assert frozen.params["embedding"]["table"].dtype == jnp.bfloat16


def test_a_base_in_few_bits_is_not_kept_whole_for_the_backward_pass():
  config = make({"rank": 4, "base_dtype": "int8"})
  recipe, params, frozen = begin(config)
  of = lambda p: recipe.loss(p, frozen, batch(), jnp.int32(0), jax.random.key(0))[0]
  residuals = jax.eval_shape(lambda p: jax.vjp(of, p)[1], params)
  kernel = base()["group_0"]["mamba_0"]["mixer"]["x"]["kernel"]
  whole = {kernel.shape, (kernel.shape[1], kernel[0].size // kernel.shape[1])}
  assert not [leaf.shape for leaf in jax.tree.leaves(residuals) if leaf.shape in whole and leaf.dtype == jnp.float32]
