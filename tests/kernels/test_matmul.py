import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ultrathink_jax.kernels.matmul import matmul, transposed, transposed_product
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


def test_layers_that_are_written_out_do_not_keep_their_numbers_either():
  layers = quantize(jax.random.normal(jax.random.key(2), (8, 256, 256)), "nf4")
  run = lambda x, layers: jnp.sum(jax.lax.scan(lambda x, k: (jnp.tanh(matmul(x, k)), None), x, layers, unroll=8)[0])
  compiled = jax.jit(jax.grad(run)).lower(jnp.ones((4, 256)), layers).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 256 * 256 * 4


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), ("tensor", None), (None, "fsdp")])
def test_a_kernel_in_few_bits_over_devices_equals_one_device(spec):
  mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  quantized, x = quantize(jax.random.normal(jax.random.key(1), (128, 10)), "int4"), jnp.tile(X, (1, 2))
  step = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(matmul(x, kernel)))))
  laid_out = jax.device_put(quantized, NamedSharding(mesh, PartitionSpec(*spec)))
  rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
  for a, b in zip(jax.tree.leaves(step(rows, laid_out)), jax.tree.leaves(step(x, quantized)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64, 96), (70, 33), (2, 5, 1, 7), (1, 1)])
def test_transposed_moves_every_number_and_its_gradient_back(shape, dtype):
  x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
  moved = jax.jit(transposed)(x)
  assert moved.dtype == dtype
  np.testing.assert_array_equal(moved, np.swapaxes(np.asarray(x), -2, -1))
  through = lambda move: jax.grad(lambda x: jnp.sum(jnp.sin(move(x).astype(jnp.float32))))(x)
  np.testing.assert_array_equal(through(transposed), through(lambda x: x.swapaxes(-2, -1)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("columns", [(5,), (6, 40)])
def test_a_transposed_product_is_summed_in_float32(columns, dtype):
  x = jax.random.normal(jax.random.key(0), (70, 33)).astype(dtype)
  y = jax.random.normal(jax.random.key(1), (70, *columns)).astype(dtype)
  exact = np.einsum("td,t...->d...", np.asarray(x, np.float64), np.asarray(y, np.float64))
  product = jax.jit(transposed_product)(x, y)
  assert product.dtype == jnp.float32
  np.testing.assert_allclose(product, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_in_bfloat16_do_not_depend_on_how_many_there_are(rows):
  x, kernel = X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
  product = jax.jit(matmul)(x[:rows], KERNEL)
  assert product.shape == (rows, 10)
  exact = np.asarray(x[:rows], np.float64) @ np.asarray(kernel, np.float64)
  np.testing.assert_allclose(product.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


def test_a_kernel_that_is_not_trained_has_no_gradient_worked_out():
  gradient = lambda argnums: jax.jit(jax.grad(lambda x, kernel: jnp.sum(matmul(x, kernel)), argnums))
  products = lambda argnums: gradient(argnums).lower(X, KERNEL).as_text().count("dot_general")
  assert (products((0, 1)), products(0)) == (2, 1)
