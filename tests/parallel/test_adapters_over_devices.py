"""Adapters over a frozen base train on a mesh as on one device."""

import jax
import numpy as np
import pytest

from tests.parallel.meshes import run

HYBRID = {"layers": "(MAE)x4"}
# alpha and rate are large, so that a few steps move the loss by more than rounding does.
LORA = {"rank": 4, "alpha": 16.0, "targets": ("all", "router")}
CASES = {
  "experts too, fsdp x tensor x expert": (LORA, {"fsdp": 2, "tensor": 2, "expert": 2}),
  "few bits, fsdp x expert": (LORA | {"base_dtype": "int8"}, {"fsdp": 2, "expert": 2}),
  "stages": (LORA, {"pipe": 2, "data": 2}),
  "magnitudes, tensor": ({"rank": 4, "variant": "dora", "targets": ("attention", "mamba")}, {"tensor": 2}),
}
QUICK = ("experts too, fsdp x tensor x expert",)


@pytest.mark.parametrize(
  "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_mesh_trains_adapters_like_one_device(case):
  lora, mesh = CASES[case]
  sections = {"lora": lora, "optimizer": {"learning_rate": 0.03}}
  one, many = run({}, HYBRID, steps=4, **sections), run(mesh, HYBRID, steps=4, **sections)
  assert one.losses[0] - one.losses[-1] > 0.1
  # Twice what meshes are held to elsewhere: at ten times the rate the order of sums tells more.
  np.testing.assert_allclose(many.losses, one.losses, rtol=0, atol=2e-4)
  distance = lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)
  assert max(jax.tree.leaves(jax.tree.map(distance, many.gradients, one.gradients))) < 1e-4
