import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.parallel.placement import place
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.train import fitting
from ultrathink_jax.train.fitting import fit, is_out_of_memory, smaller, unlimited, with_accumulation
from ultrathink_jax.train.plan import compile_step, make_plan
from ultrathink_jax.train.program import batch_shapes, compile_program
from ultrathink_jax.train.state import make_init

MODEL = {"layers": "F", "embed_dim": 16, "mlp_dim": 64}
AUTO = tiny_config(model=MODEL, train={"batch_size": 64, "sequence_length": 64, "accumulation_steps": 0})
CHOICES = [1, 2, 4, 8]  # rows of a device: 8, 4, 2, 1
RECIPE = make_pretrain(AUTO)


def devices(memory_bytes):
  return Devices("cpu", "test device", 8, memory_bytes)


@pytest.fixture(scope="module")
def programs():
  """Returns accumulation steps -> the compiled step."""
  with_steps = [with_accumulation(AUTO, steps) for steps in CHOICES]
  plans = [make_plan(config, RECIPE, devices(2**40)) for config in with_steps]
  made = [compile_program(config, RECIPE, plan) for config, plan in zip(with_steps, plans, strict=True)]
  return dict(zip(CHOICES, made, strict=True))


@pytest.fixture
def totals(programs, monkeypatch):
  """Returns accumulation steps -> bytes that the step takes; what `fit` compiles is there already."""
  monkeypatch.setattr(fitting, "compile_program", lambda config, *_: programs[config.train.accumulation_steps])
  return {steps: program.memory.total for steps, program in programs.items()}


def test_more_accumulation_takes_less_memory(totals):
  assert totals[1] > totals[2] > totals[4] > totals[8]


@pytest.mark.parametrize("steps", CHOICES)
def test_the_fewest_steps_that_fit_are_chosen_and_the_batch_stays(totals, steps):
  lines = []
  fitted = fit(AUTO, RECIPE, make_plan, devices(int(totals[steps] / 0.95) + 2), lines.append)
  assert fitted == with_accumulation(AUTO, steps)
  assert len(lines) == 1
  assert lines[0].startswith(f"[fit] accumulation_steps={steps}: a step takes ")
  assert ("would take" in lines[0]) == (steps > 1)


def test_what_does_not_fit_in_any_part_is_refused_with_what_to_try(totals):
  with pytest.raises(ConfigError, match=r"micro-batches of 8 sequences takes .* can give .*; try --config.model.remat"):
    fit(AUTO, RECIPE, make_plan, devices(totals[8] // 2), print)


def test_a_number_that_is_given_stays():
  config = with_accumulation(AUTO, 2)
  assert fit(config, RECIPE, make_plan, devices(1), print) is config


def test_the_number_of_an_earlier_session_stays_where_it_fits(totals):
  at_most = lambda steps: devices(int(totals[steps] / 0.95) + 2)
  assert fit(AUTO, RECIPE, make_plan, devices(2**40), print, before=4).train.accumulation_steps == 4
  assert fit(AUTO, RECIPE, make_plan, at_most(4), print, before=2).train.accumulation_steps == 4
  assert fit(AUTO, RECIPE, make_plan, at_most(4), print, before=3).train.accumulation_steps == 4


def test_the_measured_program_is_the_one_that_training_runs(programs):
  config = with_accumulation(AUTO, 2)
  plan = make_plan(config, RECIPE, unlimited(devices(1)))
  with jax.set_mesh(plan.mesh):
    state, frozen = jax.jit(make_init(config, RECIPE, plan.optimizer), out_shardings=(plan.shardings, None))()
    rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch_shapes(config, plan))
    batch = place(plan.mesh, rows, config.train.batch_size)
    step = compile_step(config, RECIPE, plan, state, frozen, batch)
  assert code(step) == code(programs[2].executable)


def code(executable):
  """Returns a program without where in the source it is from, as the cache of compiled programs knows it."""
  text = re.sub(r"\nFileNames\n.*?\n\n\n", "", executable.as_text(), flags=re.DOTALL)
  return re.sub(r"metadata={.*?}", "", text)


@hypothesis.given(
  number=st.integers(1, 12),
  fixed=st.integers(0, 1000),
  each_row=st.integers(1, 1000),
  have=st.integers(1, 10**6),
  bias=st.floats(0.2, 5),
  noise=st.lists(st.floats(0.5, 2), min_size=13, max_size=13),
)
def test_a_search_compiles_four_times_at_most_and_finds_what_fits(number, fixed, each_row, have, bias, noise):
  choices = [2**i for i in range(number)]
  need = lambda steps: fixed + each_row * choices[-1] // steps

  def search(estimate):
    tried = {}

    def measure(steps):
      assert steps not in tried
      tried[steps] = fitting._Measured(need(steps))
      return tried[steps]

    found = fitting._search(choices, have, estimate, measure, tried)
    assert len(tried) <= 4
    assert found is None or (found in tried and need(found) <= have)
    assert (found is None) == (need(choices[-1]) > have)
    return found

  search(lambda steps: 1 + int(need(steps) * noise[choices.index(steps)]))
  best = next((steps for steps in choices if need(steps) <= have), None)
  assert search(lambda steps: bias * need(steps)) == best


def test_a_compiler_that_refuses_leads_to_more_steps():
  tried = {}

  def measure(steps):
    tried[steps] = fitting._Measured(None if steps < 8 else 10)
    return tried[steps]

  assert fitting._search([1, 2, 4, 8, 16], 100, lambda steps: 50, measure, tried) in (8, 16)


def test_each_smaller_config_has_half_the_rows_until_there_is_none():
  config, seen = with_accumulation(AUTO, 1), []
  while config is not None:
    seen.append((config.train.accumulation_steps, config.model.remat))
    assert config.train.batch_size == 64
    config = smaller(config)
  assert seen == [(1, "none"), (2, "full"), (4, "full"), (8, "full")]
  last = tiny_config(model={"remat": "none"}, train={"batch_size": 8})
  assert (smaller(last).train.accumulation_steps, smaller(last).model.remat) == (1, "full")


def test_errors_other_than_of_memory_are_told_apart():
  error = jax.errors.JaxRuntimeError
  assert is_out_of_memory(error("RESOURCE_EXHAUSTED: Out of memory allocating 1600000000 bytes."))
  assert is_out_of_memory(MemoryError("Unable to allocate 14.9 GiB"))
  assert not is_out_of_memory(error("INTERNAL: Failed to launch a kernel"))
  assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))


PROGRAM = """
import resource
import jax, jax.numpy as jnp
from ultrathink_jax.train.fitting import is_out_of_memory
jax.config.update("jax_cpu_enable_async_dispatch", False)
x = jnp.ones(12_000)
step = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0).sum()).lower(x).compile()
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = int(size.split()[1]) * 1024 + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
  step(x).block_until_ready()
except Exception as error:
  print("out of memory" if is_out_of_memory(error) else repr(error))
"""


def test_a_device_that_runs_out_is_recognised():
  result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
  assert result.stdout.strip() == "out of memory", result.stderr
