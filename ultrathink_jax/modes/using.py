"""Modes that use a trained model, and those that exchange one."""

import dataclasses
from pathlib import Path

from ultrathink_jax import api
from ultrathink_jax.config import Config
from ultrathink_jax.interop.workdir import import_directory
from ultrathink_jax.logs import log
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.modes.shared import find_recipe, format_result, make_evaluation, prepare, write
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.processes import is_first
from ultrathink_jax.parallel.sharding import tree_shardings
from ultrathink_jax.report.facts import data_facts, gzip_bits_per_byte
from ultrathink_jax.workdir import claim


def evaluate(config: Config, workdir: Path) -> None:
  """Evaluates the newest intact checkpoint on the whole validation split and writes evaluation.json."""
  if is_first() and (workdir / "config.json").exists():
    claim(workdir, config, log)  # other data would replace the tokenizer of a trained model
  prepared = prepare(config, workdir)
  mesh = make_mesh(config)
  shardings = tree_shardings(mesh, find_recipe(config).axes)
  params, step = api.restore_params(workdir, config.model, shardings=shardings, averaged=config.evaluate.averaged)
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


def import_model(config: Config, source: Path, workdir: Path) -> None:
  """Makes a workdir of a Hugging Face directory, at step 0."""
  config = import_directory(source, workdir, config, workdir / api.DATA_DIRECTORY / "tokenizer")
  count = count_model(config.model)
  log(f"[import] {source}: {config.model.layers}, {count.total:,} parameters, {count.active:,} active")
  log(f"[import] train on with --config={workdir / 'config.py'} --workdir={workdir}")


def export_model(workdir: Path, output: Path, family: str | None) -> None:
  """Writes the newest checkpoint as a directory that transformers loads, or says why it is one of ours."""
  api.load(workdir).save_pretrained(output, family=family)
