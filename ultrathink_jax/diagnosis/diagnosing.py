"""A configuration, looked at and tried: facts, a few real steps, and what they say."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ultrathink_jax.config import Config
from ultrathink_jax.diagnosis.arithmetic import static_facts
from ultrathink_jax.diagnosis.findings import failure, findings
from ultrathink_jax.diagnosis.probing import probe
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.models.layer import groups
from ultrathink_jax.parallel.devices import Devices, describe_devices
from ultrathink_jax.parallel.mesh import batch_ways
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.train import fitting
from ultrathink_jax.train.plan import Plan, make_plan
from ultrathink_jax.train.preflight import USABLE, gib
from ultrathink_jax.types import Recipe

_SHORTEST = 128  # tokens to which a sequence is cut where memory is short


def diagnose(
  config: Config, recipe: Recipe, log: Callable[[str], None], train_tokens: int | None = None
) -> dict[str, Any]:
  """Returns what diagnose.json holds: facts, a few real steps on synthetic tokens, and `findings`.

  `failure` is a line where a gradient is not finite, else None. `train_tokens` is the size of the training data, where
  known. What is too large for the memory here is tried in a smaller shape, and `tried_as` says in which; where even
  that is too large, `probe` is None.

  Raises:
    ConfigError: there is no such run, on any device.
  """
  devices = describe_devices()
  config = _settled(config, recipe, devices, log)
  plan = make_plan(config, recipe, fitting.unlimited(devices))
  facts = static_facts(config, plan, devices, train_tokens)
  fitting_config, changes = shrink(config, recipe, plan, devices)
  for line in changes:
    log(f"[diagnose] {line}")
  probed = None
  if fitting_config is not None:
    tried = recipe if fitting_config is config else find_recipe(fitting_config)
    tried_plan = make_plan(fitting_config, tried, fitting.unlimited(devices))
    probed = probe(fitting_config, tried, tried_plan, log)
  found = {**facts, "tried_as": changes, "probe": probed}
  found |= {"findings": findings(config, found), "failure": failure(found)}
  return _finite(found)


def _settled(config: Config, recipe: Recipe, devices: Devices, log: Callable[[str], None]) -> Config:
  """Returns the config with a number of accumulation steps: those that fit, or the most there can be."""
  try:
    return fitting.fit(config, recipe, make_plan, devices, log)
  except ConfigError as error:
    log(f"[diagnose] {error}")
    return fitting.with_accumulation(config, fitting.accumulation_choices(config, devices.count)[-1])


def shrink(config: Config, recipe: Recipe, plan: Plan, devices: Devices) -> tuple[Config | None, list[str]]:
  """Returns the config in the largest shape whose steps can be made here, if there is one, and what was changed.

  Rows go first, then the length of a sequence, then the repeats of the model's periods.
  """
  have = int(devices.memory_bytes * USABLE)
  lacking = lambda plan: plan.need.total + plan.need.parameters > have  # the probe keeps the parameters of a step
  changes: list[str] = []
  smaller = _shapes(config, batch_ways(plan.mesh.shape))
  while lacking(plan):
    if (change := next(smaller, None)) is None:
      return None, [*changes, f"no step was made: the smallest needs {gib(plan.need.total)} of {gib(have)}"]
    config, line = change
    changes.append(f"a step needs {gib(plan.need.total)} of {gib(have)}: tried with {line}")
    try:
      plan = make_plan(config, find_recipe(config), fitting.unlimited(devices))
    except ConfigError:  # the smaller shape does not divide over the mesh
      return None, [*changes, "no step was made: that does not divide over the mesh"]
  return config, changes


def _shapes(config: Config, ways: int) -> Any:
  """Yields ever smaller shapes of a run, each with its description."""
  change = lambda **keys: dataclasses.replace(config, train=dataclasses.replace(config.train, **keys))
  if config.train.batch_size > ways:
    config = change(batch_size=ways, accumulation_steps=1)
    yield config, f"train.batch_size={ways}"
  while config.train.sequence_length % 2 == 0 and config.train.sequence_length // 2 >= _SHORTEST:
    config = change(sequence_length=config.train.sequence_length // 2)
    yield config, f"train.sequence_length={config.train.sequence_length}"
  layers = "".join(group.letters for group in groups(config.model))
  if sum(group.repeats for group in groups(config.model)) > len(groups(config.model)):
    yield dataclasses.replace(config, model=dataclasses.replace(config.model, layers=layers)), f"model.layers={layers}"


def _finite(value: Any) -> Any:
  """Returns `value` with None in place of every float that is not finite, as JSON has none."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
