import jax
import pytest

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.train.plan import make_plan
from ultrathink_jax.train.step import make_train_step
from ultrathink_jax.types import Batch, Context

SHAPE = {"train": {"batch_size": 8, "sequence_length": 64}}


def plan(memory_bytes, **sections):
  config = tiny_config(**(SHAPE | sections))
  recipe = make_pretrain(config)
  return config, recipe, make_plan(config, recipe, Devices("cpu", "test device", 8, memory_bytes))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_estimate_is_what_the_compiler_allocates(remat):
  # In a loop: of periods written out, the compiler finds again what was to be computed again.
  model = {"remat": remat, "layers": "(MAFE)x2", "embed_dim": 64, "mlp_dim": 256, "unroll": 1}
  mesh = {"data": 1, "fsdp": 8}
  config, recipe, planned = plan(2**40, model=model, mesh=mesh)
  rows = jax.ShapeDtypeStruct((1, 64), "int32")
  batch = Batch(rows, rows, jax.ShapeDtypeStruct((1, 64), "float32"), Context(rows, rows))
  step = make_train_step(config, recipe, planned.optimizer)
  memory = jax.jit(step, donate_argnums=0).lower(planned.shapes, None, batch).compile().memory_analysis()
  state = 3 * sum(leaf.size * 4 for leaf in jax.tree.leaves(planned.shapes.params))
  gradients = state // 3
  compiled = memory.temp_size_in_bytes - gradients
  assert 0.5 * compiled < planned.need.activations < 2 * compiled


def test_a_run_that_does_not_fit_is_told_what_would():
  large = {"train": {"batch_size": 64, "sequence_length": 64}}
  need = plan(2**40, **large)[2].need
  assert need.activations > need.state
  have = int((need.optimizer + 3 * need.parameters + need.activations // 4) / 0.95)
  with pytest.raises(
    ConfigError, match=r"needs .* per device .* can give .*; --config.train.accumulation_steps=[48] would"
  ):
    plan(have, **large)
  with pytest.raises(ConfigError, match="this memory holds the train state of a model of about"):
    plan(need.parameters)


def test_sharding_over_devices_divides_the_train_state():
  alone = plan(2**40, mesh={"data": 8})[2].need
  shared = plan(2**40, mesh={"data": 1, "fsdp": 8})[2].need
  assert shared.optimizer < 0.3 * alone.optimizer


def test_a_model_can_be_planned_without_memory_for_it():
  model = tiny_model(layers="(MAFE)x100", embed_dim=4096, mlp_dim=16384, mamba_head_dim=64)
  with pytest.raises(ConfigError, match=r"about .* parameters.* this one takes"):
    plan(2**30, model=vars(model) | {"remat": "full"})


def test_remat_policies_keep_less_the_more_they_compute_again():
  need = lambda remat: plan(2**40, model={"remat": remat, "layers": "(AF)x8"})[2].need.activations
  none, dots, named, full = (need(remat) for remat in ("none", "dots", "named", "full"))
  assert none > dots > named
  assert dots > full  # between the last two it depends: one keeps less, the other computes less again at a time
