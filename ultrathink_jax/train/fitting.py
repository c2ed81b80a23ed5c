"""The largest micro-batch that fits in memory: chosen before a run by compiling it, made smaller where one ran out."""

import bisect
import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax

from ultrathink_jax.config import Config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.parallel.mesh import axis_sizes, check_division, divides
from ultrathink_jax.train.plan import Plan
from ultrathink_jax.train.preflight import USABLE, gib
from ultrathink_jax.train.program import compile_program
from ultrathink_jax.types import Recipe

_COMPILES = 4  # at most
_RECOMPUTING = ("full", "offload")  # model.remat that keeps least on the device


class _Measured(NamedTuple):
  """Bytes of a compiled step on one device; None where the compiler refused it."""

  total: int | None

  def fits(self, have: int) -> bool:
    return self.total is not None and self.total <= have

  def __str__(self) -> str:
    return "more than there is" if self.total is None else gib(self.total)


def fit(
  config: Config,
  recipe: Recipe,
  make_plan: Callable[[Config, Recipe, Devices], Plan],
  devices: Devices,
  log: Callable[[str], None],
  before: int = 0,
) -> Config:
  """Returns the config with the fewest accumulation steps whose compiled train step fits; the batch stays as it is.

  A config that names a number keeps it. `before` is the number of an earlier session of the same run, kept where it
  still fits, so that the run goes on with the same bits. The choice follows from the arguments alone: all processes
  make the same one if they are given the same `devices`, and each of them compiles every step that is tried.

  Raises:
    ConfigError: not even the smallest micro-batch fits, or the batch does not divide over the mesh.
  """
  if config.train.accumulation_steps:
    return config
  have = int(devices.memory_bytes * USABLE)
  choices = accumulation_choices(config, devices.count)
  plans: dict[int, Plan] = {}
  tried: dict[int, _Measured] = {}

  def plan(steps: int) -> Plan:
    if steps not in plans:
      plans[steps] = make_plan(with_accumulation(config, steps), recipe, unlimited(devices))
    return plans[steps]

  def measure(steps: int) -> _Measured:
    program = compile_program(with_accumulation(config, steps), recipe, plan(steps))
    tried[steps] = _Measured(program.memory.total if program.memory else None)
    return tried[steps]

  if before in choices and measure(before).fits(have):
    log(f"[fit] accumulation_steps={before}, as before: a step takes {tried[before]} of {gib(have)}")
    return with_accumulation(config, before)
  steps = _search(choices, have, lambda steps: plan(steps).need.total, measure, tried)
  if steps is None:
    raise ConfigError(_explain(config, devices, choices[-1], tried[choices[-1]], have))
  log(_describe(choices, steps, tried, have))
  return with_accumulation(config, steps)


def _search(
  choices: list[int],
  have: int,
  estimate: Callable[[int], int],
  measure: Callable[[int], _Measured],
  tried: dict[int, _Measured],
) -> int | None:
  """Returns the first of the rising `choices` that fits, or one close to it where that takes many compiles.

  The first guess is the estimate's; what a compiled step takes then corrects the estimates of the others.
  """
  low, high, scale = -1, len(choices), 1.0  # choices[low] does not fit and choices[high] does
  for steps in tried:
    low = max(low, choices.index(steps))
  while high - low > 1:
    is_last_chance = high == len(choices) and len(tried) >= _COMPILES - 1
    if len(tried) >= _COMPILES and not is_last_chance:
      break
    fits = lambda steps, scale=scale: estimate(steps) * scale <= have
    guess = low + 1 + bisect.bisect_left(choices[low + 1 : high], True, key=fits)
    guess = len(choices) - 1 if is_last_chance else min(guess, high - 1)
    found = measure(choices[guess])
    low, high = (low, guess) if found.fits(have) else (guess, high)
    scale = (found.total or max(have, scale * estimate(choices[guess]))) / estimate(choices[guess])
  return choices[high] if high < len(choices) else None


def _describe(choices: list[int], steps: int, tried: dict[int, _Measured], have: int) -> str:
  line = f"[fit] accumulation_steps={steps}: a step takes {tried[steps]} of {gib(have)}"
  fewer = [k for k in tried if k < steps]
  if not fewer:
    return line
  return f"{line} ({max(fewer)} would take {tried[max(fewer)]})"


def _explain(config: Config, devices: Devices, steps: int, measured: _Measured, have: int) -> str:
  rows = config.train.batch_size // steps
  return (
    f"a train step with micro-batches of {rows} sequence{'s' if rows > 1 else ''} takes {measured} per device and "
    f"{devices.count} x {devices.kind} can give {gib(have)}; {what_to_try(with_accumulation(config, steps))}"
  )


def accumulation_choices(config: Config, num_devices: int) -> list[int]:
  """Returns the accumulation steps that divide the batch into micro-batches which divide over the mesh, rising.

  Raises:
    ConfigError: there are none.
  """
  sizes = axis_sizes(config.mesh, num_devices)
  sizes["data"] *= config.mesh.slices
  check_division(with_accumulation(config, 1), sizes)
  batch_size = config.train.batch_size
  divisors = (k for k in range(1, batch_size + 1) if batch_size % k == 0)
  return [k for k in divisors if divides(with_accumulation(config, k), sizes)]


def with_accumulation(config: Config, steps: int) -> Config:
  """Returns the config with this many accumulation steps."""
  return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=steps))


def unlimited(devices: Devices) -> Devices:
  """Returns the devices as if their memory had no end: for a plan of which compiling has shown that it fits."""
  return dataclasses.replace(devices, memory_bytes=sys.maxsize)


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether an error is that a device, or the host, has no memory left."""
  if isinstance(error, MemoryError):
    return True
  return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def smaller(config: Config) -> Config | None:
  """Returns the config with micro-batches of half the size or less, recomputed in the backward pass, if there is one.

  The batch stays as it is. The recipe has to be made anew.
  """
  steps = config.train.accumulation_steps
  more = [k for k in accumulation_choices(config, jax.device_count()) if k >= 2 * steps]
  remat = config.model.remat if config.model.remat in _RECOMPUTING else "full"
  if not more and remat == config.model.remat:
    return None
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
  return with_accumulation(config, more[0] if more else steps)


def what_to_try(config: Config) -> str:
  """Returns, as the end of a line, what makes a train step take less memory than it does with `config`."""
  advice = []
  steps = config.train.accumulation_steps
  if more := [k for k in accumulation_choices(config, jax.device_count()) if k > steps]:
    advice.append(f"--config.train.accumulation_steps={more[0]}")
  if config.model.remat not in _RECOMPUTING:
    advice.append("--config.model.remat=full")
  if config.optimizer.moment_dtype == "float32":
    advice.append("--config.optimizer.moment_dtype=bfloat16")
  return f"try {', '.join([*advice, 'a shorter train.sequence_length, or more devices with mesh.fsdp'])}"
