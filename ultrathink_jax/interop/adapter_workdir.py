"""A PEFT adapter directory as an adapted run at step 0, over a base that is here."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ultrathink_jax.config import Config, LoraConfig, ModelConfig
from ultrathink_jax.data.tokenizer import load_tokenizer
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop import huggingface
from ultrathink_jax.interop.bases import Base, saved_model
from ultrathink_jax.interop.bases import tokenizer_directory as find_tokenizer
from ultrathink_jax.interop.huggingface import find_exact
from ultrathink_jax.interop.peft.adapter import PeftAdapter
from ultrathink_jax.interop.peft.reading import read_adapter
from ultrathink_jax.interop.workdir import write_first_checkpoint
from ultrathink_jax.lora.adapters import from_named
from ultrathink_jax.lora.adapting import adaptation_of, without_empty
from ultrathink_jax.lora.freezing import Trained
from ultrathink_jax.lora.targets import PRESETS, adaptable
from ultrathink_jax.models.language_model import parameter_shapes
from ultrathink_jax.models.naming import places, put_at


def import_adapter(source: Path, base: str, workdir: Path, config: Config, tokenizer_directory: Path) -> Config:
  """Returns the configuration of the new run: `config` over the base, with what the adapter trained.

  Raises:
    ConfigError: the workdir holds a run, or the adapter is one that we do not compute.
    CheckpointError: a file of the base or of the adapter is missing or damaged.
  """
  if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
    raise ConfigError(f"{workdir} holds a run already; choose another --workdir")
  model = saved_model(Path(base))
  is_foreign = huggingface.is_huggingface(Path(base))
  family = huggingface.read_config(Path(base))[0] if is_foreign else find_exact(model)[0]
  adapter = read_adapter(source, model, family)
  config = dataclasses.replace(
    config,
    model=model,
    lora=_section(config.lora, adapter, model),
    train=dataclasses.replace(config.train, trainable=tuple(adapter.trained)),
    checkpoint=dataclasses.replace(config.checkpoint, init_from=base),
  )
  Base(base, model)  # which must be there, and whole
  load_tokenizer(find_tokenizer(Path(base))).save(tokenizer_directory)
  write_first_checkpoint(workdir, config, _params(config, adapter))
  return config


def _section(defaults: LoraConfig, adapter: PeftAdapter, model: ModelConfig) -> LoraConfig:
  """Returns the section `lora` that makes these adapters: the commonest rank and alpha, and patterns for the others."""
  named = {name.removesuffix(".kernel"): each for name, each in adapter.adapters.items()}
  rank = Counter(each.rank for each in named.values()).most_common(1)[0][0]
  alpha = Counter(each.alpha for each in named.values()).most_common(1)[0][0]
  everything = adaptable(model)
  preset = next((key for key, test in PRESETS.items() if set(named) == set(filter(test, everything))), None)
  has_magnitude = any(each.magnitude is not None for each in named.values())
  return dataclasses.replace(
    defaults,
    rank=rank,
    expert_rank=rank,
    alpha=alpha,
    dropout=0.0 if any(each.a.ndim == 3 for each in named.values()) else adapter.dropout,
    targets=tuple(named) if preset is None else (preset,),
    rank_pattern=tuple(f"{name}={each.rank}" for name, each in named.items() if each.rank != rank),
    alpha_pattern=tuple(f"{name}={each.alpha!r}" for name, each in named.items() if each.alpha != alpha),
    scaling="rslora" if adapter.is_rslora else "standard",
    variant="dora" if has_magnitude else "lora",
    init="kaiming",
  )


def _params(config: Config, adapter: PeftAdapter) -> dict[str, Any]:
  adaptation, trained = adaptation_of(config), {}
  at = places(config.model, parameter_shapes(config.model))
  for each in adaptation.trained:
    put_at(trained, each.path, _rows(each, at, adapter))
  parts = {"lora": from_named(adaptation.targets, adapter.adapters), "trained": trained}
  return jax.tree.map(jnp.asarray, without_empty(parts))


def _rows(each: Trained, at: dict[str, Any], adapter: PeftAdapter) -> Any:
  """Returns a trained leaf, its layers in a row."""
  rows = {
    place.repeat: adapter.trained[name]
    for name, place in at.items()
    if place.path == each.path and name in adapter.trained
  }
  if None in rows:
    return rows[None]
  return jnp.stack([rows[repeat] for repeat in sorted(rows)])
