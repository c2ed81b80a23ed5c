"""What several modes need of a run: its data, its evaluation, its files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ultrathink_jax import api
from ultrathink_jax.config import Config
from ultrathink_jax.data import prepare as preparing
from ultrathink_jax.data.loader import validation_batches
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.evaluate import perplexity
from ultrathink_jax.evaluate.perplexity import Evaluation
from ultrathink_jax.interop.bases import Base, tokenizer_directory
from ultrathink_jax.logs import log
from ultrathink_jax.parallel.placement import place, rows_here
from ultrathink_jax.parallel.processes import barrier, is_first
from ultrathink_jax.redaction import redact
from ultrathink_jax.types import Parameters
from ultrathink_jax.workdir import write_json


def find_base(config: Config) -> Base | None:
  """Returns the model that a run begins with as a whole: an adapted run's base, or a saved directory; else None.

  Raises ConfigError and CheckpointError.
  """
  path = config.checkpoint.init_from
  if not config.is_adapted:  # a workdir gives what fits of it: see train/initializing.py
    is_saved = path and (Path(path) / "config.json").is_file() and not (Path(path) / "checkpoints").is_dir()
    return Base(path, config.model) if is_saved else None
  if not path:
    what = f"lora.rank={config.lora.rank}" if config.lora.rank else f"train.trainable={config.train.trainable}"
    raise ConfigError(f"{what} adapts a base, and checkpoint.init_from is empty; name a workdir or a model's directory")
  return Base(path, config.model)


def with_tokenizer(config: Config) -> Config:
  """Returns the config with the tokenizer of what the run begins with, where it names none: others mean nothing."""
  path = config.checkpoint.init_from
  if not path or config.data.tokenizer != "auto":
    return config
  directory = tokenizer_directory(Path(path))
  if not directory.is_dir():
    return config
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(directory)))


def prepare(config: Config, workdir: Path) -> PreparedData:
  """Returns the prepared data of a run, which the first process prepares. Raises ConfigError and DataError."""
  directory = workdir / api.DATA_DIRECTORY
  prepared = None
  if is_first():
    prepared = preparing.prepare(config.data, config.model.vocab_size, directory, log, config.quality, config.code)
  barrier("data")
  prepared = prepared or preparing.open_prepared(directory)
  if not len(prepared.validation):
    raise ConfigError(
      f"data.validation_fraction={config.data.validation_fraction} leaves nothing to evaluate on; choose a larger one"
    )
  return prepared


def make_evaluation(
  config: Config, prepared: PreparedData, mesh: Mesh
) -> Callable[[Parameters, int | None], Evaluation]:
  """Returns (params, number of batches or None for all) -> Evaluation on the validation split, by all processes."""
  sum_of_losses = perplexity.make_sum_of_losses(config.model)
  store = prepared.validation
  rows = config.train.micro_batch_size

  def evaluation(params: Parameters, limit: int | None) -> Evaluation:
    length, share = config.train.sequence_length, rows_here(mesh, rows)
    batches = validation_batches(store, prepared.tokenizer, rows, length, limit, share)
    placed = (place(mesh, batch, rows) for batch in batches)
    with jax.set_mesh(mesh):
      return perplexity.evaluate(sum_of_losses, params, placed, store.text_bytes / (store.num_tokens + len(store)))

  return evaluation


def format_result(result: Evaluation, gzip_bits: float) -> str:
  """Returns the line that a run, or an evaluation, ends with."""
  relation = "below" if result.bits_per_byte < gzip_bits else "above"
  return (
    f"[result] validation: {result.bits_per_byte:.3f} bits per byte, {relation} gzip -9 ({gzip_bits:.3f}); "
    f"loss {result.loss:.4f}, perplexity {result.perplexity:,.2f} over {result.targets:,} tokens"
  )


def write(path: Path, values: dict[str, Any]) -> None:
  """Writes a JSON file of the run, without secrets, by the first process."""
  if is_first():
    write_json(path, redact(values))
