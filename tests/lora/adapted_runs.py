"""Small adapted models that tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tests.conftest import packed_context, tiny_config
from ultrathink_jax.config import Config
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.types import Batch

LAYERS = "(MAFE)x2"


def make(lora=None, **sections) -> Config:
  """Returns a tiny run with this section `lora`; keywords override keys of other sections."""
  model = {"layers": LAYERS} | sections.pop("model", {})
  config = tiny_config(lora=lora or {}, **sections)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


@functools.cache
def base():
  """Returns the parameters that all of them adapt."""
  return jax.jit(lambda: init_params(make().model, jax.random.key(3)))()


def batch():
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
  return Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones((2, 12)), packed_context(7, 5, batch=2))


def begin(config: Config):
  """Returns the recipe, what is trained and what is frozen."""
  recipe = find_recipe(config)
  return recipe, *jax.jit(recipe.init)(jax.random.key(0), base())


def loss_and_gradient(recipe, params, frozen):
  function = lambda params, frozen: recipe.loss(params, frozen, batch(), jnp.int32(0), jax.random.key(1))[0]
  return jax.jit(jax.value_and_grad(function))(params, frozen)


def disturbed(params, scale=0.1):
  """Returns what is trained with noise added to every leaf, so that adapters add something."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(9), len(leaves))
  noisy = [x + scale * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, noisy)
