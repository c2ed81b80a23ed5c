import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels.matmul import matmul
from ultrathink_jax.kernels.quantized import FORMATS, dequantize, quantize

X = jax.random.normal(jax.random.key(0), (6, 64))
KERNEL = jax.random.normal(jax.random.key(1), (64, 10))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_kernel_in_few_bits_multiplies_and_carries_back_as_the_numbers_it_stands_for(format, dtype):
  quantized = quantize(KERNEL, format)
  step = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(matmul(x, kernel).astype(jnp.float32)))))
  ours, plain = (step(X.astype(dtype), kernel) for kernel in (quantized, dequantize(quantized, jnp.float32)))
  assert ours[1].dtype == dtype
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_backward_pass_of_a_scan_keeps_few_bits_and_not_the_numbers():
  layers = quantize(jax.random.normal(jax.random.key(2), (5, 64, 64)), "nf4")
  run = lambda x: jnp.sum(jax.lax.scan(lambda x, kernel: (jnp.tanh(matmul(x, kernel)), None), x, layers)[0])
  scans = [eqn for eqn in jax.make_jaxpr(jax.grad(run))(X).eqns if eqn.primitive.name == "scan"]
  assert len(scans) == 2
  assert all(var.aval.size < 5 * 64 * 64 for eqn in scans for var in eqn.outvars if hasattr(var.aval, "size"))


def test_a_kernel_that_is_not_trained_has_no_gradient_worked_out():
  gradient = lambda argnums: jax.jit(jax.grad(lambda x, kernel: jnp.sum(matmul(x, kernel)), argnums))
  products = lambda argnums: gradient(argnums).lower(X, KERNEL).as_text().count("dot_general")
  assert (products((0, 1)), products(0)) == (2, 1)
