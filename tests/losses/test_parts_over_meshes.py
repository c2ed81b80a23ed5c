import numpy as np
import pytest

from tests.parallel.meshes import run
from tests.parallel.test_parity import relative_difference

LOSS = {"scan_weight": 0.5, "label_smoothing": 0.1, "z_weight": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", [{"pipe": 2}, {"fsdp": 2}, {"context": 2}, {"tensor": 2}], ids=lambda mesh: next(iter(mesh))
)
def test_the_parts_of_a_loss_are_the_same_over_a_mesh(mesh):
  model = {"layers": "(ME)x2", "gather_ahead": "fsdp" in mesh, "remat": "full"}
  alone = run({}, model | {"gather_ahead": False}, steps=2, loss=LOSS)
  spread = run(mesh, model, steps=2, loss=LOSS)
  np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-5)
  assert relative_difference(spread.gradients, alone.gradients) < 1e-4
