from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels import experts_loop as experts_loop_module
from ultrathink_jax.kernels.experts import Bank, experts, rank_in_expert, rounded
from ultrathink_jax.kernels.experts_loop import experts_loop
from ultrathink_jax.kernels.experts_sorted import experts_sorted
from ultrathink_jax.kernels.quantized import quantize

T, K, E, D, F = 37, 2, 5, 8, 12


def inputs(dtype=jnp.float32, num_unrouted=4):
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (T, D), dtype)
  choices = jax.vmap(lambda key: jax.random.permutation(key, E)[:K])(jax.random.split(keys[1], T))
  choices = choices.at[-num_unrouted:].set(E)
  gates = jax.random.uniform(keys[2], (T, K))
  kernels = [
    0.3 * jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys[3:], [(E, D, F), (E, D, F), (E, F, D)], strict=True)
  ]
  return x, choices, gates, kernels


def test_the_plain_form_equals_a_loop_over_tokens():
  x, choices, gates, (gate, up, down) = inputs()
  y, _ = experts(x, choices, gates, gate, up, down)
  for t in range(T):
    expected = np.zeros(D)
    for k in range(K):
      e = int(choices[t, k])
      if e < E:
        g = np.asarray(x[t] @ gate[e], np.float64)
        expected += float(gates[t, k]) * (g / (1 + np.exp(-g)) * (x[t] @ up[e])) @ down[e]
    np.testing.assert_allclose(y[t], expected, rtol=1e-4, atol=1e-4)


def test_ranks_count_earlier_tokens_only():
  choices = jnp.array([[0, 1], [1, 0], [0, 2], [3, 3]])
  np.testing.assert_array_equal(rank_in_expert(choices, 3), [[0, 0], [1, 1], [2, 0], [0, 0]])


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("capacity", [None, 1, 6, 1000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("fast", "fewest_rows"), [(experts_sorted, 0), (experts_loop, 2), (experts_loop, 64)])
def test_fast_forms_equal_the_plain_form_forward_and_gradient(
  fast, fewest_rows, capacity, dtype, activation, monkeypatch
):
  # Loops with chunks of 9, 4 and 2 rows, some of which reach into the next expert; and with chunks of 9 alone.
  monkeypatch.setattr(experts_loop_module, "_MOST_ROWS", 9)
  monkeypatch.setattr(experts_loop_module, "_FEWEST_ROWS", fewest_rows)
  monkeypatch.setattr(experts_loop_module, "_FEW_TOKENS", 0)
  x, choices, gates, (gate, up, down) = inputs(dtype)
  kernels = (gate if activation == "swiglu" else None, up, down)

  def outputs(function):
    def loss(x, gates, kernels):
      y, is_computed = function(x, choices, gates, *kernels, capacity, activation)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), is_computed

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gates, kernels)

  ((_, kept), gradients), ((_, kept_plain), gradients_plain) = outputs(fast), outputs(experts)
  np.testing.assert_array_equal(kept, kept_plain)
  tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 0.1, "atol": 0.5}
  for ours, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_plain), strict=True):
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), **tolerance)


def test_capacity_changes_the_output():
  x, choices, gates, kernels = inputs()
  few, kept = experts_sorted(x, choices, gates, *kernels, 2)
  every, all_kept = experts_sorted(x, choices, gates, *kernels, None)
  assert int(kept.sum()) == 2 * E
  assert int(all_kept.sum()) == (T - 4) * K
  assert float(jnp.abs(few - every).max()) > 0.1


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("max_branches", [0, E])
def test_few_tokens_take_other_ways_to_the_same_result(num_tokens, capacity, max_branches, monkeypatch):
  monkeypatch.setattr(experts_loop_module, "_MAX_BRANCHES", max_branches)
  x, choices, gates, kernels = inputs()
  few = [array[-num_tokens - 3 : -3] for array in (x, choices, gates)]  # the last of them is not routed
  y, kept = experts_loop(*few, *kernels, capacity)
  plain, kept_plain = experts(*few, *kernels, capacity)
  np.testing.assert_allclose(y, plain, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(kept, kept_plain)


def banks(kernels, format=None):
  """Returns the kernels, maybe in few bits, with adapters of rank 3."""
  keys = iter(jax.random.split(jax.random.key(1), 6))
  factor = lambda *shape: 0.3 * jax.random.normal(next(keys), (E, *shape))
  return [Bank(quantize(k, format) if format else k, factor(k.shape[1], 3), factor(3, k.shape[2])) for k in kernels]


@pytest.mark.parametrize("num_tokens", [1, 20, T])
@pytest.mark.parametrize(("form", "few"), [(experts, 0), (experts_sorted, 0), (experts_loop, 0), (experts_loop, 32)])
def test_adapters_of_experts_equal_kernels_that_they_are_merged_into(form, few, num_tokens, monkeypatch):
  monkeypatch.setattr(experts_loop_module, "_MOST_ROWS", 9)
  monkeypatch.setattr(experts_loop_module, "_FEW_TOKENS", few)
  x, choices, gates, kernels = inputs(num_unrouted=1)
  few = [array[-num_tokens - 1 : -1] for array in (x, choices, gates)]

  def loss(form, adapters, x, gates, is_merged):
    merged = rounded(jnp.float32, *adapters) if is_merged else adapters
    return jnp.sum(jnp.sin(form(x, few[1], gates, *merged)[0]))

  gradients = lambda *call: jax.jit(jax.value_and_grad(partial(loss, *call), argnums=(0, 1, 2)), static_argnums=3)
  ours = gradients(form)(banks(kernels), few[0], few[2], False)
  plain = gradients(experts)(banks(kernels), few[0], few[2], True)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [experts, experts_sorted, experts_loop])
def test_kernels_in_few_bits_equal_the_numbers_they_stand_for(form, monkeypatch):
  monkeypatch.setattr(experts_loop_module, "_FEW_TOKENS", 0)
  x, choices, gates, kernels = inputs()
  few_bits = banks(kernels, "int8")
  plain = [Bank(rounded(jnp.float32, Bank(bank.kernel))[0]) for bank in few_bits]

  def loss(adapters, banks):
    used = [Bank(bank.kernel, *adapter) for bank, adapter in zip(banks, adapters, strict=True)]
    return jnp.sum(jnp.sin(form(x, choices, gates, *used)[0]))

  step = partial(jax.jit(jax.value_and_grad(loss)), [bank[1:] for bank in few_bits])
  for a, b in zip(jax.tree.leaves(step(few_bits)), jax.tree.leaves(step(plain)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_loop_works_out_the_gradients_of_trained_kernels_alone_and_to_the_same_bits(trained, monkeypatch):
  monkeypatch.setattr(experts_loop_module, "_FEW_TOKENS", 0)
  x, choices, gates, kernels = inputs()

  def loss(some, x, gates):
    used = [some.get(i, kernel) for i, kernel in enumerate(kernels)]
    return jnp.sum(jnp.sin(experts_loop(x, choices, gates, *used)[0]))

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  some, every = ({i: kernels[i] for i in names} for names in (trained, range(3)))
  ours, whole = gradients(some, x, gates), gradients(every, x, gates)
  for i in trained:
    np.testing.assert_array_equal(ours[0][i], whole[0][i])
  for a, b in zip(ours[1:], whole[1:], strict=True):
    np.testing.assert_array_equal(a, b)
  products = lambda some: str(jax.make_jaxpr(gradients)(some, x, gates)).count("dot_general")
  assert products(some) - products({}) == len(trained)
