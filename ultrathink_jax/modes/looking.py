"""Modes that show what a run would be, and train nothing."""

import dataclasses
import sys
from pathlib import Path

from ultrathink_jax import api
from ultrathink_jax.config import Config
from ultrathink_jax.data import prepare as preparing
from ultrathink_jax.diagnosis import diagnose as diagnosing
from ultrathink_jax.diagnosis import format_diagnosis
from ultrathink_jax.errors import ConfigError, NumericsError
from ultrathink_jax.logs import log
from ultrathink_jax.modes.shared import write
from ultrathink_jax.optimizers.schedules import resolve_steps
from ultrathink_jax.parallel.processes import is_first
from ultrathink_jax.plan import planning
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.report import data_page
from ultrathink_jax.report.data import inspect
from ultrathink_jax.report.data_text import format_inspection, marks_for
from ultrathink_jax.report.describe import describe as description
from ultrathink_jax.report.describe import format_description
from ultrathink_jax.workdir import claim


def data(config: Config, workdir: Path) -> None:
  """Prepares what training reads, prints what it is like and writes data.json and data.html."""
  if not is_first():
    return
  if (workdir / "config.json").exists():
    claim(workdir, config, log)  # other data would replace the tokenizer of a trained model
  directory = workdir / api.DATA_DIRECTORY
  prepared = preparing.prepare(config.data, config.model.vocab_size, directory, log, config.quality, config.code)
  found = inspect(config, prepared, directory, workdir.resolve().name)
  write(workdir / "data.json", found)
  page = data_page.write(workdir / "data.html", found, config)
  text = format_inspection(found, marks_for(sys.stdout))
  log(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))  # a terminal may lack characters
  log(f"[data] {page}")


def tokenizer(config: Config, workdir: Path) -> None:
  """Trains the tokenizer that training would use, or finds it, and says where it lies."""
  if (workdir / "config.json").exists():
    claim(workdir, config, log)
  directory = workdir / api.DATA_DIRECTORY
  made = preparing.prepare_tokenizer(config.data, config.model.vocab_size, directory, log, config.quality, config.code)
  log(
    f"[tokenizer] {made.vocab_size:,} tokens in {directory / 'tokenizer'}; use it elsewhere by --config.data.tokenizer"
  )


def describe(config: Config, workdir: Path) -> None:
  """Prints the layer table and writes describe.json."""
  log(format_description(config))
  workdir.mkdir(parents=True, exist_ok=True)
  write(workdir / "describe.json", description(config))


def diagnose(config: Config, workdir: Path) -> None:
  """Looks at a configuration, makes a few steps on synthetic tokens, and writes diagnose.json.

  Raises:
    NumericsError: a gradient is not finite.
  """
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, steps=resolve_steps(config.train, rows_per_epoch=None))
  )
  found = diagnosing(config, find_recipe(config), log)
  log(format_diagnosis(found))
  workdir.mkdir(parents=True, exist_ok=True)
  write(workdir / "diagnose.json", found)
  if found["failure"]:
    raise NumericsError(found["failure"])


def plan(config: Config, workdir: Path, request: planning.Request, output: Path | None) -> None:
  """Prints what a train step needs and takes on devices that are not here, and writes plan.json and `output`."""
  if not (config.train.accumulation_steps or request.is_search):
    raise ConfigError("train.accumulation_steps=0 is found on the devices; give mode plan a number, or --search")
  report, text = planning.make_plan(config, request, log)
  log(text)
  workdir.mkdir(parents=True, exist_ok=True)
  write(workdir / "plan.json", report)
  if output is not None:
    output.write_text(f"# Plan: {workdir.name}\n\n{text}\n")
