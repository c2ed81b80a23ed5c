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
  if model.adapters is None or wanted.is_merged or not model.adapters.config.lora.rank:
    model.save_pretrained(output, family=wanted.family)
  else:
    model.save_adapter(output, wanted.expert_layout)
