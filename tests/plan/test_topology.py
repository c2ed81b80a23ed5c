import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.plan.collectives import Collective
from ultrathink_jax.plan.roofline import dollars, exchange_seconds, roofline
from ultrathink_jax.plan.topology import Link, axis_links, link_along, make_devices, parse, prepare


@pytest.mark.parametrize(
  "name", ["v5p", "v5p:", "v5p:4x4", "v5e:4x4x4", "a100:8", "h200:2x4", "v5p:4x0x4", "v5p:4*4*4"]
)
def test_a_topology_that_is_none_is_refused_with_an_example(name):
  with pytest.raises(ConfigError, match=r"--topology=.*write for example"):
    parse(name, 1)


def test_a_topology_has_its_shape_times_its_slices():
  assert parse("v5p:4x4x8", 2).num_devices == 256
  assert parse("h200:16", 2).num_devices == 16  # nodes are among the devices


def test_a_missing_compiler_is_one_line_that_names_the_package(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"libtpu is not installed; run pip install"):
    prepare(parse("v5p:2x2x1", 1))


def test_virtual_devices_are_the_cpus_and_too_few_are_refused():
  assert len(make_devices(parse("h200:4", 1))) == 4
  with pytest.raises(ConfigError, match="needs 4096 virtual devices and XLA_FLAGS sets 8"):
    make_devices(parse("cpu:4096", 1))


@pytest.mark.parametrize(
  ("name", "ways", "links", "hops"),
  [
    ("v5p:4x4x4", (4, 4, 4), 6, 1),  # three rings
    ("v5p:4x4x4", (4, 4, 1), 4, 1),
    ("v5p:4x4x4", (1, 1, 4), 2, 1),
    ("v5p:4x4x4", (1, 1, 2), 1, 1),  # half a ring is a line
    ("v5p:4x4x8", (1, 1, 8), 2, 2),  # rows pass through twice as many chips
    ("v5e:4x4", (4, 4), 2, 1),  # lines: only 16 wrap
    ("v5e:16x16", (1, 16), 2, 4),
  ],
)
def test_bandwidth_of_an_axis_is_that_of_the_rings_and_lines_it_lies_on(name, ways, links, hops):
  topology = parse(name, 1)
  line = [SimpleNamespace(coords=[*place, 0, 0][:3], slice_index=0) for place in np.ndindex(*ways)]
  assert link_along(topology, line) == Link("ici", links * topology.chip.link_bandwidth, float(hops))


def test_an_axis_over_several_nodes_or_slices_has_the_network():
  gpus = parse("h200:16", 1)
  assert link_along(gpus, [SimpleNamespace(id=number) for number in range(8)]).name == "nvlink"
  assert link_along(gpus, [SimpleNamespace(id=number) for number in (0, 8)]).name == "network"
  chips = [SimpleNamespace(coords=[0, 0, 0], slice_index=number) for number in range(2)]
  assert link_along(parse("v5p:4x4x4", 2), chips).name == "network"


def test_links_are_told_for_axes_of_several_devices_only():
  mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  assert set(axis_links(parse("h200:8", 1), mesh)) == {"fsdp"}


LINKS = {"fsdp": Link("ici", 400e9), "tensor": Link("ici", 200e9, 2.0), "data": Link("network", 5e9)}


def exchange(kind, axes, group, size):
  return Collective(kind, axes, group, size, 1, False, "", "")


@pytest.mark.parametrize(
  ("each", "seconds"),
  [
    (exchange("all-gather", ("fsdp",), 16, 16 * 10**9), 15e9 / (400e9 * 0.8)),
    (exchange("all-gather", ("fsdp", "tensor"), 64, 64 * 10**9), 63e9 / (600e9 * 0.8)),
    (exchange("all-to-all", ("tensor",), 8, 8 * 10**9), 7e9 * 2 / (200e9 * 0.8)),
    (exchange("all-reduce", ("data", "fsdp"), 32, 32 * 10**9), 62e9 / (5e9 * 0.8)),
  ],
)
def test_time_of_an_exchange_is_bytes_over_its_links(each, seconds):
  np.testing.assert_allclose(exchange_seconds(each, LINKS), seconds)


def test_a_step_takes_its_slowest_part_and_then_what_is_not_hidden():
  topology = parse("v5p:4x4x4", 1)
  gather = exchange("all-gather", ("fsdp",), 2, 2 * 320 * 10**9)
  times = roofline(topology, LINKS, 459e12 * 0.7 * 3, 2765e9 * 0.8 * 2, [gather], bubble=0.0)
  np.testing.assert_allclose([times.compute, times.memory, times.exchange["fsdp"]], [3, 2, 1])
  np.testing.assert_allclose([times.overlapped, times.serial], [3, 4])
  half = dataclasses.replace(times, bubble=0.5)
  np.testing.assert_allclose([half.overlapped, half.serial], [6, 8])


def test_price_by_hand():
  np.testing.assert_allclose(dollars(1000, 3.6, 64, 4.2), 64 * 4.2)
