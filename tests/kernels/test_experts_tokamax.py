import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_experts import inputs
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels.experts import experts
from ultrathink_jax.kernels.experts_tokamax import experts_tokamax


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "tokamax", None)
  x, choices, gates, kernels = inputs()
  with pytest.raises(ConfigError, match="pip install tokamax or choose 'pallas'"):
    experts_tokamax(x, choices, gates, *kernels)


@pytest.mark.parametrize("capacity", [None, 6])
def test_what_tokamax_is_asked_for_is_the_plain_form(monkeypatch, capacity):
  """With the package's function replaced by the one of JAX whose contract it keeps."""
  monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=jax.lax.ragged_dot))
  x, choices, gates, kernels = inputs()

  def outputs(function):
    def loss(x, gates, kernels):
      y, is_computed = function(x, choices, gates, *kernels, capacity)
      return jnp.sum(jnp.sin(y)), is_computed

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gates, kernels)

  for ours, plain in zip(*(jax.tree.leaves(outputs(f)) for f in (experts_tokamax, experts)), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_tokamax_equals_the_plain_form():
  pytest.importorskip("tokamax")
  x, choices, gates, kernels = inputs(jnp.bfloat16)
  x, kernels = jnp.tile(x, (1, 8)), [jnp.tile(kernel, (1, 8, 8)) / 8 for kernel in kernels]  # rows of whole 16 bytes
  ours, _ = jax.jit(experts_tokamax)(x, choices, gates, *kernels)
  plain, _ = jax.jit(experts)(x, choices, gates, *kernels)
  np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=0.05, atol=0.05)
