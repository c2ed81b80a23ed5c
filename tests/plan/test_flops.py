import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.models.counts import count_model, train_flops_per_token
from ultrathink_jax.plan.flops import count_flops
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.types import Batch, Context


def flops(function, *shapes):
  return count_flops(jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]))


def test_a_product_is_two_flops_for_each_multiply_and_add():
  assert flops(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7


def test_scans_count_every_turn_and_recomputation_counts_again():
  layer = lambda x, w: (jnp.tanh(x @ w), None)
  forward = lambda w, x: jax.lax.scan(layer, x, w)[0].sum()
  recomputed = lambda w, x: jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()
  one = 2 * 8 * 16 * 16
  assert flops(forward, (5, 16, 16), (8, 16)) == 5 * one
  assert flops(jax.grad(forward), (5, 16, 16), (8, 16)) == 5 * 3 * one
  assert flops(jax.grad(recomputed), (5, 16, 16), (8, 16)) == 5 * 4 * one


def test_what_every_device_does_counts_for_each():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  product = jax.shard_map(
    jnp.matmul, mesh=mesh, in_specs=(PartitionSpec("x"), PartitionSpec()), out_specs=PartitionSpec("x")
  )
  assert flops(product, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


def test_a_dense_model_has_the_flops_of_the_formula():
  config = tiny_config(train={"batch_size": 2, "sequence_length": 64})
  model = tiny_model(layers="(AF)x3", embed_dim=64, mlp_dim=256, vocab_size=256, attention_backend="reference")
  config = dataclasses.replace(config, model=model)
  recipe = make_pretrain(config)
  params = jax.eval_shape(recipe.init, jax.random.key(0))[0]
  ints, floats = (jax.ShapeDtypeStruct((2, 64), dtype) for dtype in (jnp.int32, jnp.float32))
  batch = Batch(ints, ints, floats, Context(ints, ints))
  loss = lambda params, batch: recipe.loss(params, None, batch, jnp.int32(0), jax.random.key(0))[0]
  counted = count_flops(jax.make_jaxpr(jax.grad(loss))(params, batch)) / (2 * 64)
  formula = train_flops_per_token(model, count_model(model), 64)
  attention = 12 * 3 * model.num_heads * model.head_dim * 64 / 2  # the reference computes what the mask hides too
  np.testing.assert_allclose(counted, formula + attention, rtol=0.25)
