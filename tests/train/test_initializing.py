import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.saving import assert_same_bits, save, settings, state_at
from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.testing.damage import flip_bit
from ultrathink_jax.train.checkpoint import Checkpoints
from ultrathink_jax.train.initializing import initialize_from


@pytest.fixture
def workdir(tmp_path):
  """Returns a run with two checkpoints, the newer one with averaged parameters."""
  with Checkpoints(tmp_path / "checkpoints", settings()) as checkpoints:
    save(checkpoints, 1)
    save(checkpoints, 2, averaged=state_at(5).params)
  return tmp_path


@pytest.mark.parametrize(("place", "source"), [("", 5), ("checkpoints", 5), ("checkpoints/2", 5), ("checkpoints/1", 1)])
def test_all_parameters_are_taken_from_a_workdir_its_checkpoints_or_one_of_them(workdir, place, source):
  said = []
  params = initialize_from(workdir / place, state_at(9).params, said.append)
  assert_same_bits(params, state_at(source).params)
  assert said == [f"[init] 3 of 3 parameters from {workdir / place} step {min(source, 2)}"]


def test_what_is_not_there_or_has_another_shape_keeps_its_first_value(workdir):
  said = []
  like = state_at(9, size=41).params
  like["layers"]["new"] = jnp.ones((2,))
  like["head"] = {"w": jnp.ones((2, 2))}
  params = initialize_from(workdir, like, said.append)
  expected = {"embedding": like["embedding"], "layers": {**state_at(5).params["layers"], "new": jnp.ones((2,))}}
  assert_same_bits(params, expected | {"head": like["head"]})
  (line,) = said
  assert (
    line == f"[init] 2 of 5 parameters from {workdir} step 2; not there: head/w, layers/new; other shape: embedding"
  )


def test_parameters_take_the_type_and_the_layout_of_the_new_run(workdir):
  mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
  sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
  params = {"embedding": jax.device_put(jnp.zeros((40, 3), jnp.bfloat16), sharded)}
  taken = initialize_from(workdir / "checkpoints" / "1", params, lambda line: None)["embedding"]
  assert (taken.sharding, taken.dtype) == (sharded, jnp.bfloat16)
  np.testing.assert_array_equal(taken, state_at(1).params["embedding"].astype(jnp.bfloat16))


def test_a_model_of_which_nothing_fits_is_refused_with_the_nearest_names(workdir):
  like = {"embeddings": jnp.zeros((40, 3)), "layers": {"scale": jnp.zeros((5,))}}
  with pytest.raises(
    CheckpointError, match=r"embeddings \[40, 3\] is nearest to embedding \[40, 3\]; layers/scale \[5\]"
  ):
    initialize_from(workdir, like, print)


def test_a_damaged_checkpoint_is_not_taken(workdir):
  said = []
  flip_bit(workdir / "checkpoints" / "2", 0)
  with pytest.raises(CheckpointError, match="2 is damaged"):
    initialize_from(workdir / "checkpoints" / "2", state_at(9).params, print)
  assert_same_bits(initialize_from(workdir, state_at(9).params, said.append), state_at(1).params)
  assert "going back to step 1" in said[0]
  assert (workdir / "checkpoints" / "2").exists()


def test_a_place_without_checkpoints_is_refused(tmp_path):
  with pytest.raises(CheckpointError, match="holds no checkpoint"):
    initialize_from(tmp_path / "nowhere", state_at(9).params, print)
