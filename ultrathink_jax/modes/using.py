"""Modes that use a trained model, and those that exchange one."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax import api
from ultrathink_jax.config import Config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.adapter_workdir import import_adapter
from ultrathink_jax.interop.peft.adapter import CONFIG_FILE
from ultrathink_jax.interop.workdir import import_directory
from ultrathink_jax.logs import log
from ultrathink_jax.lora import coverage
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.models.language_model import parameter_shapes
from ultrathink_jax.modes.shared import format_result, make_evaluation, prepare, with_tokenizer, write
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.processes import is_first
from ultrathink_jax.parallel.sharding import tree_shardings
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.report.facts import data_facts, gzip_bits_per_byte
from ultrathink_jax.workdir import claim


def evaluate(config: Config, workdir: Path) -> None:
  """Evaluates the newest intact checkpoint on the whole validation split and writes evaluation.json."""
  config = with_tokenizer(config)
  if is_first() and (workdir / "config.json").exists():
    claim(workdir, config, log)  # other data would replace the tokenizer of a trained model
  prepared = prepare(config, workdir)
  mesh = make_mesh(config)
  if config.is_adapted:
    adapters, step = api.load_adapters(workdir, config)
    params = adapters.weights
  else:
    shardings = tree_shardings(mesh, find_recipe(config).axes)
    like = parameter_shapes(config.model)
    params, step = api.restore_params(workdir, like, shardings=shardings, averaged=config.evaluate.averaged)
  result = make_evaluation(config, prepared, mesh)(params, None)
  gzip_bits = gzip_bits_per_byte(prepared)
  log(format_result(result, gzip_bits))
  values = {"step": step, **result._asdict(), "gzip_bits_per_byte": gzip_bits, "data": data_facts(prepared)}
  write(workdir / "evaluation.json", values)


def generate(config: Config, workdir: Path, prompts: list[str]) -> None:
  """Prints each prompt with its completion."""
  model = dataclasses.replace(api.load(workdir), sampling=config.generate)
  for prompt, completion in zip(prompts, model.generate(prompts), strict=True):
    print(prompt + completion)


def import_model(config: Config, source: Path, workdir: Path, base: str | None) -> None:
  """Makes a workdir of a Hugging Face directory, or of a PEFT adapter and its base, at step 0."""
  tokenizer_directory = workdir / api.DATA_DIRECTORY / "tokenizer"
  if (source / CONFIG_FILE).is_file():
    if base is None:
      raise ConfigError(f"{source} holds an adapter; say with --base=DIR what it is for, a workdir or a model")
    config = import_adapter(source, base, workdir, config, tokenizer_directory)
    log("\n".join(f"[lora] {line}" for line in coverage.describe(config)))
    log(f"[import] train on with --config={workdir / 'config.py'} --workdir={workdir}")
    return
  config = import_directory(source, workdir, config, tokenizer_directory)
  count = count_model(config.model)
  log(f"[import] {source}: {config.model.layers}, {count.total:,} parameters, {count.active:,} active")
  log(f"[import] train on with --config={workdir / 'config.py'} --workdir={workdir}")


class Export(NamedTuple):
  """What mode export is to write: a family of models, and of adapted runs the merged model or adapters in a layout."""

  family: str | None
  is_merged: bool
  expert_layout: str


def export_model(workdir: Path, output: Path, wanted: Export) -> None:
  """Writes the newest checkpoint: a model as a directory that transformers loads, adapters as one that PEFT does."""
  model = api.load(workdir)
  if model.adapters is None or wanted.is_merged:
    model.save_pretrained(output, family=wanted.family)
  else:
    model.save_adapter(output, wanted.expert_layout)
