"""A trained model for people at a prompt: `load(path)`, then `.logits`, `.generate`, `.save_pretrained`."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ultrathink_jax import logs
from ultrathink_jax.config import GenerateConfig, ModelConfig
from ultrathink_jax.config.older import from_saved
from ultrathink_jax.data.tokenizer import Tokenizer, load_tokenizer
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.generate.engine import generate
from ultrathink_jax.interop import huggingface
from ultrathink_jax.interop.families import FAMILIES
from ultrathink_jax.interop.pretrained import FORMAT, load_pretrained, save_pretrained
from ultrathink_jax.interop.tokenizer_files import save_for_transformers
from ultrathink_jax.models.language_model import LanguageModel, inference_config, init_params, logits, single_documents
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.progress import result_step
from ultrathink_jax.types import Parameters

DATA_DIRECTORY = "data"  # of a workdir: tokenizer and tokens
_DEFAULT_SAMPLING = GenerateConfig(128, 0.8, 0, 0.95, 1.0, (), 0)


@dataclasses.dataclass(frozen=True)
class Model:
  """Parameters with the config that gives them meaning and the tokenizer they were trained with."""

  config: ModelConfig
  params: Parameters
  tokenizer: Tokenizer
  sampling: GenerateConfig = _DEFAULT_SAMPLING
  step: int | None = None  # optimizer steps behind the parameters, where known

  def logits(self, tokens: Int[Any, "B T"]) -> Float[Array, "B T V"]:
    """Returns float32 next-token logits of rows that hold one document each, from its beginning on.

    A document begins with `tokenizer.bos_id`.
    """
    return _logits(inference_config(self.config), self.params, jnp.asarray(tokens, jnp.int32))

  def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
    """Returns a completion of each prompt, without the prompt.

    `settings` are the keys of `config.generate`: max_new_tokens, temperature (0: greedy), top_k, top_p,
    repetition_penalty, stop, seed.
    """
    if isinstance(prompts, str):
      raise ConfigError("prompts is a string; pass a list of strings")
    unknown = settings.keys() - {field.name for field in dataclasses.fields(GenerateConfig)}
    if unknown:
      names = ", ".join(field.name for field in dataclasses.fields(GenerateConfig))
      raise ConfigError(f"{', '.join(sorted(unknown))}: not a setting of generate; choose from {names}")
    if "stop" in settings:
      settings["stop"] = tuple(settings["stop"])
    sampling = dataclasses.replace(self.sampling, **settings)
    return generate(self.config, self.params, self.tokenizer, prompts, sampling)

  def save_pretrained(self, directory: str | Path, format: str = "auto", family: str | None = None) -> None:
    """Writes a directory that transformers and `load` read.

    `format` is auto, huggingface or ultrathink_jax. Where no class of transformers computes the model exactly, auto
    writes our own format, which `load` alone reads, and prints why. `family` is the model_type to write, by default the
    plainest that is exact.

    Raises:
      ConfigError: format is huggingface, or family is given, and the model does not fit.
    """
    directory = Path(directory)
    _require_known("format", format, ("auto", "huggingface", FORMAT))
    if family:
      _require_known("family", family, tuple(FAMILIES))
    if format != FORMAT:
      ids = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": self.tokenizer.eos_id}
      try:
        export = huggingface.save(directory, self.config, self.params, ids, FAMILIES[family] if family else None)
      except ConfigError as error:
        if format == "huggingface" or family:
          raise
        print(f"[export] {error}")
      else:
        _report(directory, export, save_for_transformers(directory, self.tokenizer))
        return
    save_pretrained(directory, self.config, self.params, self.tokenizer)


def _require_known(key: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise ConfigError(f"{key}={value!r} is not one of {', '.join(allowed)}")


def _report(directory: Path, export: huggingface.Export, note: str) -> None:
  grown = ""
  if export.written > export.parameters:
    grown = f"; layers of zeros make {export.parameters:,} parameters {export.written:,}"
  print(f"[export] {directory} holds a {export.family.architecture}{grown}{'; ' if note else ''}{note}")


def load(path: str | Path) -> Model:
  """Returns the model of a workdir (its newest checkpoint), of one checkpoint in it, or of a saved directory.

  A saved directory is one of ours or of the transformers library; of the latter, the architectures in
  `interop.families.FAMILIES`.

  Raises:
    CheckpointError: there is no such model, or it is damaged.
    ConfigError: it is one of transformers that we do not compute.
    DataError: it has no tokenizer that we read.
  """
  path = Path(path)
  if path.parent.name == "checkpoints" and path.name.isdigit():
    return _load_workdir(path.parent.parent, int(path.name))
  if (path / "checkpoints").is_dir():
    return _load_workdir(path, None)
  if huggingface.is_huggingface(path):
    return Model(*huggingface.load(path), load_tokenizer(path))
  if (path / "config.json").is_file():
    return Model(*load_pretrained(path))
  raise CheckpointError(
    f"{path} is neither a workdir with checkpoints nor a saved model; train or save one there first"
  )


def _load_workdir(workdir: Path, step: int | None) -> Model:
  try:
    config = from_saved(json.loads((workdir / "config.json").read_text()))
  except (OSError, json.JSONDecodeError) as error:
    raise CheckpointError(f"{workdir / 'config.json'} cannot be read: {error}") from error
  params, step = restore_params(workdir, config.model, step)
  return Model(config.model, params, load_tokenizer(workdir / DATA_DIRECTORY / "tokenizer"), config.generate, step)


def restore_params(
  workdir: Path, model: ModelConfig, step: int | None = None, shardings: Any = None, averaged: bool = True
) -> tuple[Parameters, int]:
  """Returns parameters and their step, by default on this process's first device.

  `step` is by default that of the run's result: the newest intact checkpoint, or the best where training ended early.
  `averaged` takes the averaged parameters where there are any.
  """
  with Checkpoints(workdir / "checkpoints", log=logs.log) as checkpoints:
    step = result_step(checkpoints) if step is None else step
    if step is None:
      raise CheckpointError(f"{workdir / 'checkpoints'} holds no finished checkpoint; train first")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda _: device, shapes)
    return checkpoints.restore_params(step, shapes_on(shapes, shardings), averaged), step


@partial(jax.jit, static_argnums=0)
def _logits(model: ModelConfig, params: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
  return logits(LanguageModel(model).apply({"params": params}, tokens, single_documents(tokens)))
