import re
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ultrathink_jax.kernels.backends import EXPERTS
from ultrathink_jax.parallel.experts import experts_over_mesh
from ultrathink_jax.parallel.sharding import tree_shardings

AXES = ("data", "fsdp", "expert", "context", "tensor", "pipe")
B, T, K, E, D, F = 8, 8, 2, 8, 16, 12
ROWS = ("batch", "length", None)
LAYOUT = (ROWS, ROWS, ROWS, ("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed"))
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def make_mesh(**sizes):
  shape = [sizes.get(axis, 1) for axis in AXES]
  devices = jax.devices()[: np.prod(shape)]
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@cache
def inputs():
  """Returns x, choices, gates and kernels; some experts are sought after, and the end of each row is padding."""
  rng = np.random.default_rng(0)
  weights = 0.7 ** np.arange(E)
  tokens = [rng.choice(E, K, replace=False, p=weights / weights.sum()) for _ in range(B * T)]
  choices = np.array(tokens, np.int32).reshape(B, T, K)
  choices[:, -2:] = E
  normal = lambda *shape: 0.5 * rng.standard_normal(shape, np.float32)
  x, gates, kernels = normal(B, T, D), rng.random((B, T, K), np.float32), (normal(E, D, F), normal(E, D, F))
  return x, choices, gates, *kernels, normal(E, F, D)


def run(arrays, backend="reference", capacity_factor=0.0, buffer_factor=8.0, chunks=1):
  """Returns y, what was computed, and the gradients of x, gates and the kernels for a fixed gradient of y."""
  compute = partial(EXPERTS[backend], activation="swiglu")
  settings = {"capacity_factor": capacity_factor, "buffer_factor": buffer_factor, "chunks": chunks}
  x, choices, gates, *kernels = arrays

  def mixture(x, gates, kernels):
    return experts_over_mesh(compute, x, choices, gates, *kernels, **settings)

  y, pullback, is_computed = jax.vjp(mixture, x, gates, kernels, has_aux=True)
  return y, is_computed, pullback(jnp.cos(jnp.arange(1.0 * y.size)).reshape(y.shape).astype(y.dtype))


def run_on(mesh, arrays, **settings):
  with jax.set_mesh(mesh):
    return jax.jit(partial(run, **settings), in_shardings=(tree_shardings(mesh, LAYOUT),))(arrays)


@cache
def on_one_device():
  return jax.jit(run)(inputs())


def assert_equal(ours, expected, **tolerance):
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    assert one.shape == other.shape
    np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), **tolerance)


def devices_of(mesh):
  """Returns the indices of the rows and of the positions that each device, or its copies, has."""
  size = mesh.shape
  ways = size["data"] * size["fsdp"] * size["expert"]
  return list(product(np.split(np.arange(B), ways), np.split(np.arange(T), size["context"])))


def first_come(mesh, choices, bin_of_choice, limit_of):
  """Returns which choices find room: of those of a device, in token order, the first so many of each bin."""
  is_computed = np.zeros(choices.shape, bool)
  for rows, places in devices_of(mesh):
    taken = {}
    for place in product(rows, places, range(K)):
      bin = bin_of_choice(choices[place])
      taken[bin] = taken.get(bin, 0) + (choices[place] < E)
      is_computed[place] = choices[place] < E and taken[bin] <= limit_of(len(rows) * len(places))
  return is_computed


MESHES = [
  {"expert": 2},
  {"expert": 4},
  {"expert": 8},
  {"data": 2},
  {"tensor": 2},
  {"expert": 2, "context": 2},
  {"data": 2, "expert": 2, "tensor": 2},
  {"fsdp": 2, "expert": 4},
  {"fsdp": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()))
def test_a_mesh_equals_one_device_forward_and_gradient(sizes):
  assert_equal(run_on(make_mesh(**sizes), inputs()), on_one_device(), **FLOAT32)


@pytest.mark.parametrize("backend", ["sorted", "loop"])
def test_every_form_of_the_experts_and_any_number_of_chunks_give_the_same(backend):
  ours = run_on(make_mesh(expert=2, tensor=2), inputs(), backend=backend, chunks=3)
  assert_equal(ours, on_one_device(), **FLOAT32)


def test_bfloat16_tokens_keep_their_dtype_and_kernels_float32_gradients():
  x, *rest = inputs()
  y, _, gradients = run_on(make_mesh(expert=2, tensor=2), (x.astype(jnp.bfloat16), *rest), backend="sorted")
  assert [array.dtype.name for array in (y, *jax.tree.leaves(gradients))] == ["bfloat16"] * 2 + ["float32"] * 4
  expected, _, expected_gradients = on_one_device()
  assert_equal((y, gradients), (expected, expected_gradients), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2, "context": 2}, {"expert": 4}])
def test_a_small_buffer_drops_exactly_the_last_rows_that_seek_a_device(sizes):
  mesh, (x, choices, *rest) = make_mesh(**sizes), inputs()
  size = sizes["expert"]
  kept = first_come(mesh, choices, lambda e: e // (E // size), lambda tokens: int(np.ceil(1.25 * tokens * K / size)))
  assert 0 < kept.sum() < (choices < E).sum()
  ours = run_on(mesh, inputs(), buffer_factor=1.25)
  np.testing.assert_array_equal(ours[1], kept)
  assert_equal(ours, jax.jit(run)((x, np.where(kept, choices, E), *rest)), **FLOAT32)


@pytest.mark.parametrize(("sizes", "backend"), [({"data": 2, "expert": 4}, "capacity"), ({"data": 2}, "reference")])
def test_with_a_capacity_each_expert_takes_its_first_rows_of_every_device(sizes, backend):
  mesh, (x, choices, *rest) = make_mesh(**sizes), inputs()
  kept = first_come(mesh, choices, lambda e: e, lambda tokens: int(np.ceil(1.5 * tokens * K / E)))
  assert 0 < kept.sum() < (choices < E).sum()
  ours = run_on(mesh, inputs(), capacity_factor=1.5, buffer_factor=1.0, backend=backend)
  np.testing.assert_array_equal(ours[1], kept)
  assert_equal(ours, jax.jit(run)((x, np.where(kept, choices, E), *rest)), **FLOAT32)


def collectives(text):
  """Returns (operation, bytes of the result on one device, groups of devices) of all collectives in compiled HLO."""
  found = []
  pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)\("
  for line in text.splitlines():
    if match := re.search(pattern, line):
      sizes = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}
      shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
      num_bytes = sum(sizes[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in shapes)
      found.append((match[2], num_bytes, replica_groups(line)))
  return found


def replica_groups(line):
  """Returns the groups of devices, spelled one by one, as a transposed range, or by the axes of a mesh."""
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    inner = [axis for axis in sizes if f"'{axis}'" in named[2]]
    order = [list(sizes).index(axis) for axis in (*(a for a in sizes if a not in inner), *inner)]
    devices = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values())).transpose(order)
    return devices.reshape(-1, int(np.prod([sizes[axis] for axis in inner]))).tolist()
  if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
  dims, source, order = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line).groups()
  numbers = lambda text: [int(n) for n in text.split(",")]
  devices = np.arange(np.prod(numbers(source))).reshape(numbers(source))
  return (devices.transpose(numbers(order)) if order else devices).reshape(numbers(dims)).tolist()


def test_over_the_expert_axis_only_buffers_of_chosen_rows_move():
  mesh = make_mesh(fsdp=2, expert=4)
  with jax.set_mesh(mesh):
    layout = tree_shardings(mesh, LAYOUT)
    step = jax.jit(
      partial(run, buffer_factor=1.5, backend="sorted"),
      in_shardings=(layout,),
      out_shardings=(layout[0], layout[1], (layout[0], layout[2], list(layout[3:]))),
    )
    found = collectives(step.lower(inputs()).compile().as_text())
  slots = 4 * int(np.ceil(1.5 * (B * T // 8) * K / 4))
  exchanged = sorted(num_bytes for name, num_bytes, _ in found if name == "all-to-all")
  rows = slots * D * 4
  assert exchanged == [slots * 4, rows, rows, rows, rows]  # who is an expert of whom; there, back, and both gradients
  place = {device.id: index for index, device in np.ndenumerate(mesh.devices)}
  for name, _, groups in found:
    for group in groups:
      differing = {axis for axis, *places in zip(AXES, *(place[d] for d in group), strict=True) if len(set(places)) > 1}
      assert differing <= ({"expert"} if name == "all-to-all" else {"fsdp"}), (name, groups)
  assert any(name == "all-gather" for name, *_ in found)
