"""What is read from HLO text, against programs whose exchanges are known."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ultrathink_jax.plan.collectives import Collective, by_kind_and_axes, find_collectives, parse, shape_bytes
from ultrathink_jax.plan.traffic import memory_traffic


@pytest.fixture
def mesh():
  return jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)


def one(mesh, attributes: str, opcode="all-gather", shape="f32[8,4]{1,0}") -> Collective:
  hlo = f"ENTRY %main (p: f32[2,4]) -> f32[8,4] {{\n  ROOT %x = {shape} {opcode}(%p), {attributes}\n}}\n"
  (found,) = find_collectives(parse(hlo), mesh)
  return found


@pytest.mark.parametrize(
  ("attributes", "axes", "group"),
  [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("c",), 2),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("a",), 2),
    ("replica_groups={{0,1,4,5},{2,3,6,7}}", ("a", "c"), 4),
    ("replica_groups=[2,4]<=[8]", ("b", "c"), 4),
    ("replica_groups=[4,2]<=[4,2]", ("c",), 2),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ("a",), 2),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("b",), 2),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", ("a",), 2),
    ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", ("b",), 2),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y':(2)2}", ("a", "c"), 4),
    ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", ("c",), 2),
    ("replica_groups={}", ("a", "b", "c"), 8),
  ],
)
def test_groups_in_every_spelling_are_traced_to_mesh_axes(mesh, attributes, axes, group):
  found = one(mesh, attributes)
  assert (found.axes, found.group) == (axes, group)


@pytest.mark.parametrize(
  ("opcode", "shape", "moved"),
  [
    ("all-gather", "f32[8,4]{1,0}", 128 * 3 // 4),
    ("all-gather-start", "(f32[2,4]{1,0}, f32[8,4]{1,0})", 128 * 3 // 4),
    ("all-reduce", "f32[8,4]{1,0}", 2 * 128 * 3 // 4),
    ("reduce-scatter", "f32[2,4]{1,0}", 128 * 3 // 4),
    ("all-to-all", "(bf16[8]{0:T(8,128)(2,1)}, bf16[8]{0})", 32 * 3 // 4),
  ],
)
def test_bytes_received_follow_from_the_kind(mesh, opcode, shape, moved):
  assert one(mesh, "replica_groups=[2,4]<=[8]", opcode, shape).moved_bytes == moved


def test_pairs_of_a_permute_lie_on_their_axis(mesh):
  found = one(mesh, "source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", "collective-permute", "bf16[16]{0}")
  assert (found.axes, found.moved_bytes) == (("b",), 32)


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter(mesh):
  hlo = """
%all-reduce-scatter (input: f32[8,4]) -> f32[2,4] {
  %input = f32[8,4]{1,0} parameter(0)
  %all-reduce = f32[8,4]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %dynamic-slice = f32[2,4]{1,0} dynamic-slice(%all-reduce, %c, %d), dynamic_slice_sizes={2,4}
}

ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  ROOT %fusion = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
}
"""
  (found,) = find_collectives(parse(hlo), mesh)
  assert (found.kind, found.moved_bytes) == ("reduce-scatter", 96)


def test_a_gather_that_goes_on_during_a_product_counts_once_and_is_asynchronous(mesh):
  part = "f32[8,4]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}"
  fused = "".join(
    f"%{name} (p: f32[2,4]) -> f32[8,4] {{\n  ROOT %{name}.g = {part}\n}}\n\n"
    for name in ("fused_computation.1", "async_collective_fusion.2", "fused_computation.3")
  )
  main = "".join(
    f"  %x{number} = f32[8,4]{{1,0}} fusion(%p), kind=kCustom, calls=%{name}\n"
    for number, name in enumerate(("fused_computation.1", "async_collective_fusion.2", "fused_computation.3"))
  )
  hlo = f"{fused}ENTRY %main (p: f32[2,4]) -> f32[8,4] {{\n{main}}}\n"
  (found,) = find_collectives(parse(hlo), mesh)
  assert (found.count, found.is_async, found.moved_bytes) == (1, True, 96)


LOOPS = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %x)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %inner = (s32[], f32[4]{0}) while(%p), condition=%condition, body=%body
}

%forever (p: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %w = (s32[], f32[4]{0}) while(%p), condition=%forever, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_loops_multiply_by_known_turns_or_by_the_bound_of_their_condition(mesh):
  (found,) = find_collectives(parse(LOOPS), mesh)
  assert found.count == 15


def test_bytes_of_shapes_sum_over_tuples_and_know_narrow_types():
  assert shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[4]{0}, /*index=2*/f8e4m3fn[8]{0}, s32[])") == 12 + 4 + 8 + 4


def compiled(mesh, function, in_spec, out_spec, shape):
  x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, in_spec))
  mapped = jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
  return parse(jax.jit(mapped).lower(x).compile().as_text())


def test_a_compiled_loop_of_sums_is_counted_as_often_as_it_turns(mesh):
  def turn(_, x):
    return jax.lax.psum(x, "b") * 0.5

  program = compiled(
    mesh, lambda x: jax.lax.fori_loop(0, 7, turn, x), PartitionSpec("a"), PartitionSpec("a"), (8, 1024)
  )
  table = by_kind_and_axes(find_collectives(program, mesh))
  assert table == {("all-reduce", ("b",)): {"count": 7, "bytes": 7 * 4 * 1024 * 4, "async_bytes": 0}}


@pytest.mark.parametrize("axis", ["a", "b", "c"])
def test_each_exchange_is_found_on_its_axis_with_its_bytes(mesh, axis):
  swap = partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
  table = by_kind_and_axes(find_collectives(compiled(mesh, swap, PartitionSpec(), PartitionSpec(), (16, 64)), mesh))
  assert table == {("all-to-all", (axis,)): {"count": 1, "bytes": 16 * 64 * 4 // 2, "async_bytes": 0}}


def test_memory_traffic_counts_a_stacked_array_once_over_its_loop():
  hlo = """
%fused (a: f32[4,100], b: f32[100]) -> f32[100] {
  ROOT %s = f32[100]{0} add(%a, %b)
}

%body (p: (s32[], f32[4,100], f32[100])) -> (s32[], f32[4,100], f32[100]) {
  %stacked = f32[4,100]{1,0} get-tuple-element(%p), index=1
  %x = f32[100]{0} get-tuple-element(%p), index=2
  %y = f32[100]{0} fusion(%stacked, %x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4,100]{1,0}, f32[100]{0}) tuple(%i, %stacked, %y)
}

ENTRY %main (p: (s32[], f32[4,100], f32[100])) -> (s32[], f32[4,100], f32[100]) {
  ROOT %w = (s32[]) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""
  assert memory_traffic(parse(hlo)) == 4 * 3 * 400
