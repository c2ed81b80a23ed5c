import dataclasses

import jax
import pytest

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.mesh import make_mesh

TRAIN = {"batch_size": 8, "sequence_length": 32}


def mesh_of(mesh, model=None, **train):
  config = tiny_config(mesh={"data": 1} | mesh, train=TRAIN | train)
  return make_mesh(dataclasses.replace(config, model=tiny_model(**model) if model else config.model))


@pytest.mark.parametrize(
  ("mesh", "model", "train", "message"),
  [
    ({"data": 3}, {}, {}, "mesh data 3 needs 3 devices and there are 8"),
    ({"data": -1, "tensor": 3}, {}, {}, "needs 6 devices"),
    ({"slices": 3, "data": -1}, {}, {}, "mesh.slices=3 does not divide 8 devices"),
    ({"slices": 2, "data": 8}, {}, {}, "mesh data 8 needs 8 devices and a slice has 4"),
    ({"data": 8}, {}, {"batch_size": 6}, r"6 sequences .* do not divide over 8 devices .*; choose a multiple of 8"),
    ({"tensor": 8}, {"num_heads": 4}, {}, "mesh.tensor=8 does not divide model.num_heads=4; .* mesh.tensor=4"),
    ({"tensor": 4, "data": 2}, {"layers": "A"}, {}, "does not divide model.num_kv_heads=2; .* mesh.tensor=2"),
    ({"tensor": 8}, {"layers": "F", "mlp_dim": 44}, {}, "does not divide model.mlp_dim=44; .* mesh.tensor=11"),
    ({"tensor": 8}, {"layers": "M", "mamba_head_dim": 16}, {}, "the number of Mamba heads=4"),
    (
      {"tensor": 2, "data": 4},
      {"layers": "M", "embed_dim": 48, "mamba_num_groups": 3},
      {},
      "mesh.tensor=2 neither divides model.mamba_num_groups=3 nor is a multiple of it",
    ),
    ({"tensor": 8}, {"layers": "F", "vocab_size": 60}, {}, "does not divide model.vocab_size=60; .* mesh.tensor=6"),
    ({"expert": 8}, {"layers": "E"}, {}, "mesh.expert=8 does not divide model.num_experts=4; .* mesh.expert=4"),
    ({"fsdp": 8}, {"embed_dim": 36, "mamba_head_dim": 18}, {}, "mesh.fsdp=8 does not divide model.embed_dim=36; .*=9"),
    ({"context": 8}, {}, {"sequence_length": 24}, "mesh.context=8 does not divide train.sequence_length / 2=12"),
    ({"pipe": 4, "data": 2}, {"layers": "(AF)x6"}, {}, r"divide the periods of \(AF\)x6 .*=6; .* mesh.pipe=3"),
    (
      {"pipe": 2, "data": 4},
      {"layers": "(F)x2", "pipe_micro_batches": 3},
      {},
      "model.pipe_micro_batches=3 does not divide the 2 sequences of a device; choose 2",
    ),
  ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(mesh, model, train, message):
  with pytest.raises(ConfigError, match=message):
    mesh_of(mesh, model, **train)


def test_minus_one_takes_the_devices_that_are_left():
  assert mesh_of({"data": -1, "fsdp": 2}).shape["data"] == 4


def test_slices_are_the_outer_part_of_the_data_axis():
  mesh = mesh_of({"slices": 2, "data": 2, "fsdp": 2})
  assert mesh.shape["data"] == 4
  assert mesh.devices[:2].ravel().tolist() == jax.devices()[:4]
