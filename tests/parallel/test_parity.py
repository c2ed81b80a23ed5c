"""Every mesh trains like one device."""

import functools

import jax
import numpy as np
import pytest

from tests.parallel.meshes import run

MODELS = {
  "dense": {"layers": "(AF)x4"},
  "moe": {"layers": "(AE)x4"},
  "hybrid": {"layers": "(MAE)x4"},
}
MESHES = [
  {"fsdp": 8},
  {"tensor": 2},
  {"expert": 4},
  {"context": 4},
  {"pipe": 4},
  {"fsdp": 2, "tensor": 2, "expert": 2},
  {"pipe": 2, "expert": 2, "fsdp": 2},
  {"context": 2, "tensor": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"context": 2, "pipe": 2, "fsdp": 2},
  {"pipe": 2, "tensor": 2, "context": 2},
  {"slices": 2, "data": 2, "fsdp": 2},
]
QUICK = [("dense", {"pipe": 2, "tensor": 2, "context": 2}), ("moe", {"pipe": 2, "expert": 2, "fsdp": 2})]


def spelled(mesh):
  return "-".join(f"{axis}{size}" for axis, size in mesh.items())


CASES = [
  pytest.param(model, mesh, id=f"{model}-{spelled(mesh)}", marks=[] if (model, mesh) in QUICK else pytest.mark.slow)
  for model in MODELS
  for mesh in MESHES
]


@functools.cache
def on_one_device(model):
  return run({}, MODELS[model], steps=20)


def relative_difference(tree, reference):
  """Returns the norm of the difference of each leaf over the norm of the reference's, the largest of all leaves."""
  distance = lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)
  return max(jax.tree.leaves(jax.tree.map(distance, tree, reference)))


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_a_mesh_trains_like_one_device(model, mesh):
  one, many = on_one_device(model), run(mesh, MODELS[model], steps=20)
  np.testing.assert_allclose(many.losses, one.losses, rtol=0, atol=1e-4)
  assert relative_difference(many.gradients, one.gradients) < 1e-5
