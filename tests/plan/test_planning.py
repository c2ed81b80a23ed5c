import dataclasses
import json
import os

import jax
import pytest

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.chips import CHIPS
from ultrathink_jax.plan import collectives, search, table
from ultrathink_jax.plan.compiled import compile_train_step, lay_out
from ultrathink_jax.plan.exchange import exchange_lines, expert_buffer_size, gathers_over_experts
from ultrathink_jax.plan.planning import Request, make_plan
from ultrathink_jax.plan.report import make_report
from ultrathink_jax.plan.topology import make_devices, parse


def small_config(mesh, **model):
  changes = {
    "layers": "(ME)x3",
    "embed_dim": 64,
    "expert_dim": 64,
    "capacity_factor": 1.5,
    "unroll": 1,
    "remat": "full",
  }
  model = tiny_model(**changes | model)
  config = tiny_config(train={"batch_size": 16, "sequence_length": 64}, mesh={"data": 1} | mesh)
  return dataclasses.replace(config, model=model)


def compiled(config):
  topology = parse("cpu:8", 1)
  return compile_train_step(config, topology, make_devices(topology))


@pytest.fixture(scope="module")
def over_experts():
  """Returns a config on fsdp x expert, and its compiled step with what the compiler printed."""
  config = small_config({"fsdp": 2, "expert": 4})
  read, write = os.pipe()
  before = os.dup(2)
  os.dup2(write, 2)
  try:
    step = compiled(config)
  finally:
    os.dup2(before, 2)
    os.close(write)
  with os.fdopen(read) as log:
    return config, step, log.read()


def test_arguments_are_the_shards_of_the_state_and_the_batch(over_experts):
  _, step, _ = over_experts
  plan = step.plan
  shard = lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype)
  shards = jax.tree.leaves(jax.tree.map(shard, plan.shapes, plan.shardings))
  state = sum(x.size * x.dtype.itemsize for x in shards)
  batch = 5 * 4 * 16 * 64 // 8  # tokens, targets, weights, positions, segment ids
  guard = 4 * (2 * 128 + 3)  # its window and counts, which every device has
  others = step.memory.parameters + step.memory.optimizer + guard + 4
  unused = others + batch - step.memory.arguments
  assert others == state
  assert 0 <= unused <= batch  # the compiler leaves arguments out that nothing reads
  assert step.memory.aliased >= step.memory.parameters + step.memory.optimizer


def test_expert_parallelism_moves_routed_rows_only(over_experts):
  config, step, _ = over_experts
  mesh = step.plan.mesh
  found = collectives.find_collectives(collectives.parse(step.hlo), mesh)
  swaps = [c for c in found if c.kind == "all-to-all"]
  assert {c.axes for c in swaps} == {("expert",)}
  rows = [c for c in swaps if "f32" in c.shape or "bf16" in c.shape]
  assert {collectives.shape_size(c.shape) for c in rows} == {expert_buffer_size(config, mesh)}
  # There and back: forward, again when recomputed, and backward; once a period. What comes back is not recomputed.
  assert sum(c.count for c in rows) in (5 * 3, 6 * 3)
  weights = [c for c in gathers_over_experts(config, mesh, found) if "/experts" in c.name or "[16,64," not in c.shape]
  assert weights == []


def test_the_compiler_never_rematerializes_an_array_because_of_its_layout(over_experts):
  _, _, log = over_experts
  assert "nvoluntary full rematerialization" not in log


def test_a_report_is_json_and_a_table(over_experts):
  config, step, _ = over_experts
  report = make_report(config, parse("cpu:8", 1), step, price=2.0)
  assert json.loads(json.dumps(report)) == report
  text = table.format_report(report)
  assert "--config.mesh.expert=4" in text
  assert "It fits" in text
  speed = report["speed"]
  assert speed["overlapped"]["step_seconds"] <= speed["serial"]["step_seconds"]
  assert speed["counted_flops"] > speed["model_flops"] > 0
  assert any(line.startswith("expert:") for line in report["exchange"])
  assert any(line.startswith("fsdp:") for line in report["exchange"])
  assert exchange_lines(config, step.plan.mesh, collectives.parse(""), []) != []


@pytest.fixture(scope="module")
def dense():
  config = small_config({"fsdp": 8}, layers="(AF)x2")
  topology = parse("cpu:8", 1)
  return config, topology, search.candidates(config, topology, make_devices(topology))


def test_an_estimate_has_the_bytes_of_the_state_of_its_mesh(dense):
  config, topology, found = dense
  same = lambda each: each.config == config
  (estimate,) = filter(same, found)
  need = lay_out(config, topology, make_devices(topology))[1].need
  assert need.state <= estimate.memory_bytes <= 2 * need.total


def test_estimates_beyond_the_memory_of_the_chip_come_last(dense, monkeypatch):
  config, topology, found = dense
  assert len({each.config.mesh for each in found}) > 10
  assert all(each.is_fit for each in found)
  assert [each.seconds for each in found] == sorted(each.seconds for each in found)
  median = sorted(each.memory_bytes for each in found)[len(found) // 2]
  monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["cpu"], memory_bytes=median))
  tight = search.candidates(config, topology, make_devices(topology))
  fits = [each.is_fit for each in tight]
  assert fits == sorted(fits, reverse=True)
  assert 0 < sum(fits) < len(fits)


def test_a_search_compiles_the_best_and_prints_flags_to_paste():
  config = small_config({}, layers="(AF)x2")
  lines = []
  report, text = make_plan(config, Request("cpu:8", None, True, 2), lines.append)
  assert report["fits"]
  assert len(report["search"]["compiled"]) == 2
  assert table.format_flags(report) in text
  assert "ways to run" in lines[0]


def test_a_mesh_that_does_not_divide_is_refused_in_one_line():
  with pytest.raises(ConfigError, match=r"mesh.expert=8 does not divide model.num_experts=4"):
    compiled(small_config({"expert": 8}))
