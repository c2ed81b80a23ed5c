"""A trained model for people at a prompt: `load(path)`, then `.logits`, `.generate`, `.save_pretrained`."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ultrathink_jax import logs
from ultrathink_jax.config import Config, GenerateConfig, ModelConfig
from ultrathink_jax.data.tokenizer import Tokenizer, load_tokenizer
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.generate.engine import generate
from ultrathink_jax.interop import huggingface
from ultrathink_jax.interop.adapters import Adapters, compare_logits
from ultrathink_jax.interop.bases import Base, saved_config, workdir_of
from ultrathink_jax.interop.families import FAMILIES
from ultrathink_jax.interop.pretrained import FORMAT, load_pretrained, save_pretrained, to_device
from ultrathink_jax.interop.tokenizer_files import save_for_transformers
from ultrathink_jax.lora.merging import merge
from ultrathink_jax.models.language_model import (
  LanguageModel,
  inference_config,
  logits,
  parameter_shapes,
  single_documents,
  variables,
)
from ultrathink_jax.parallel.sharding import fitted_shardings, tree_shardings
from ultrathink_jax.recipes import find_recipe
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
  adapters: Adapters | None = None  # of an adapted run, of which `params` are the weights

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
    if self.adapters is not None:
      self.merge().save_pretrained(directory, format, family)
      return
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

  def merge(self) -> "Model":
    """Returns the model with its adapters worked into the weights of the base, in full precision.

    The logits of both on some tokens are compared, and what they differ by is printed.

    Raises:
      NumericsError: they differ by more than rounding, or a weight is not finite.
    """
    if self.adapters is None:
      return self
    config = self.adapters.config
    whole = self.adapters.in_full_precision(Base(config.checkpoint.init_from, config.model))
    merged = dataclasses.replace(self, params=to_device(merge(whole)), adapters=None)
    print(f"[merge] {compare_logits(self.config, whole, merged.params)}")
    return merged

  def save_adapter(self, directory: str | Path, expert_layout: str = "per_expert") -> None:
    """Writes the adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors.

    `expert_layout` is per_expert, which vLLM and older versions read too, or fused. Raises ConfigError where PEFT would
    not compute the same, and for a model without adapters.
    """
    if self.adapters is None:
      raise ConfigError("this model has no adapters; write it with save_pretrained")
    self.adapters.save(Path(directory), expert_layout)


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
  workdir = workdir_of(path)
  if workdir is not None:
    return _load_workdir(workdir, None if workdir == path else int(path.name))
  if huggingface.is_huggingface(path):
    return Model(*huggingface.load(path), load_tokenizer(path))
  if (path / "config.json").is_file():
    return Model(*load_pretrained(path))
  raise CheckpointError(
    f"{path} is neither a workdir with checkpoints nor a saved model; train or save one there first"
  )


def _load_workdir(workdir: Path, step: int | None) -> Model:
  config = saved_config(workdir)
  tokenizer = load_tokenizer(workdir / DATA_DIRECTORY / "tokenizer")
  if not config.is_adapted:
    params, step = restore_params(workdir, parameter_shapes(config.model), step)
    return Model(config.model, params, tokenizer, config.generate, step)
  adapters, step = load_adapters(workdir, config, step)
  return Model(config.model, adapters.weights, tokenizer, config.generate, step, adapters)


def load_adapters(
  workdir: Path, config: Config, step: int | None = None, mesh: Mesh | None = None, averaged: bool = True
) -> tuple[Adapters, int]:
  """Returns what an adapted run has trained, with its base, and the step it is of.

  They are laid out over `mesh`, by default on this process's first device.
  """
  base, recipe = Base(config.checkpoint.init_from, config.model), find_recipe(config)
  init = lambda whole: recipe.init(jax.random.key(config.train.seed), whole)
  of_base, of_params, layouts = None, None, None
  if mesh is not None:
    params, frozen = jax.eval_shape(init, parameter_shapes(config.model))
    of_base, of_params = tree_shardings(mesh, recipe.base_axes), fitted_shardings(mesh, recipe.axes, params)
    layouts = of_params, fitted_shardings(mesh, recipe.frozen_axes, frozen)
  params, frozen = jax.jit(init, out_shardings=layouts, donate_argnums=0)(base.load(of_base))
  params, step = restore_params(workdir, params, step, of_params, averaged)
  return Adapters(config, params, frozen, recipe.weights(params, frozen)), step


def restore_params(
  workdir: Path, like: Parameters, step: int | None = None, shardings: Any = None, averaged: bool = True
) -> tuple[Parameters, int]:
  """Returns the parameters of a run and their step, by default on this process's first device.

  `like` are arrays or shapes of what the run trains. `step` is by default that of the run's result: the newest intact
  checkpoint, or the best where training ended early. `averaged` takes the averaged parameters where there are any.
  """
  with Checkpoints(workdir / "checkpoints", log=logs.log) as checkpoints:
    step = result_step(checkpoints) if step is None else step
    if step is None:
      raise CheckpointError(f"{workdir / 'checkpoints'} holds no finished checkpoint; train first")
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda _: device, like)
    return checkpoints.restore_params(step, shapes_on(like, shardings), averaged), step


@partial(jax.jit, static_argnums=0)
def _logits(model: ModelConfig, params: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
  return logits(LanguageModel(model).apply(variables(params), tokens, single_documents(tokens)))
