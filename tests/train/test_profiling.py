"""A profile holds the steps that were asked for, and says what took longest."""

import jax
import jax.numpy as jnp
import pytest

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.train import profiling
from ultrathink_jax.train.profiling import Operation, Profiler, format_operations, parse_steps


def make_work():
  work = jax.jit(lambda x: jnp.sin(x @ x).sum())
  x = jnp.ones((256, 256))
  work(x).block_until_ready()
  return lambda: work(x)


@pytest.mark.parametrize("spec", ["", "10", "15:10", "0:3", "a:b", "1:2:3", "-1:4", "1:", "1.5:2"])
def test_a_wrong_range_is_a_mistake_of_configuration(spec, tmp_path):
  with pytest.raises(ConfigError, match="is not FIRST:LAST"):
    Profiler(spec, tmp_path, print)


def test_a_range_counts_from_one_and_has_both_ends():
  assert parse_steps("10:15") == (10, 15)


def test_the_steps_asked_for_are_traced_and_their_operations_printed(tmp_path):
  work, lines = make_work(), []
  profiler = Profiler("3:5", tmp_path, lines.append)
  for done in range(8):
    with profiler.step(done):
      work()
    assert bool(lines) == (done >= 4)
  assert lines[0].startswith(f"[profile] trace in {tmp_path / 'profile'}")
  assert lines[1].split()[1:] == ["operation", "runs", "total", "ms", "share"]
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  operations = profiling.read_operations(trace)
  products = [operation for operation in operations if operation.name.startswith(("dot", "ynn"))]
  assert {operation.count for operation in products} == {3}
  assert sum(operation.share for operation in operations) == pytest.approx(1)
  assert [o.seconds for o in operations] == sorted((o.seconds for o in operations), reverse=True)


def test_a_run_that_resumes_inside_the_range_traces_what_is_left(tmp_path):
  work, lines = make_work(), []
  profiler = Profiler("3:5", tmp_path, lines.append)
  with profiler.step(4):
    work()
  assert lines


def test_a_run_that_ends_early_still_prints(tmp_path):
  work, lines = make_work(), []
  profiler = Profiler("2:100", tmp_path, lines.append)
  with profiler.step(1):
    work()
  assert not lines
  profiler.close()
  assert lines


def test_without_a_range_nothing_is_traced(tmp_path):
  profiler = Profiler(None, tmp_path, pytest.fail)
  with profiler.step(0):
    pass
  profiler.close()
  assert list(tmp_path.iterdir()) == []


def test_a_run_behind_the_range_traces_nothing(tmp_path):
  profiler = Profiler("2:3", tmp_path, pytest.fail)
  with profiler.step(7):
    pass
  assert list(tmp_path.iterdir()) == []


def test_an_operation_counts_without_those_inside():
  events = [("loop", 0.0, 100.0), ("add", 10.0, 20.0), ("inner", 40.0, 50.0), ("add", 50.0, 10.0), ("copy", 100.0, 5.0)]
  own = {}
  for name, seconds in profiling._own_times(events):
    own[name] = own.get(name, 0) + seconds
  assert own == {"loop": 30.0, "add": 30.0, "inner": 40.0, "copy": 5.0}


def test_what_is_not_shown_is_summed_up():
  operations = [Operation(f"op{i}", 1, 0.001, 0.04) for i in range(25)]
  *_, last = format_operations(operations)
  assert last.split() == ["[profile]", "5", "others", "5.00", "20.0%"]
