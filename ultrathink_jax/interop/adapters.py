"""The adapters of a run beside its base: as a model reads them, and as PEFT does."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ultrathink_jax.config import Config, ModelConfig
from ultrathink_jax.errors import NumericsError
from ultrathink_jax.interop.bases import Base
from ultrathink_jax.interop.huggingface import find_exact
from ultrathink_jax.interop.peft.adapter import PeftAdapter
from ultrathink_jax.interop.peft.writing import write_adapter
from ultrathink_jax.logs import log
from ultrathink_jax.lora.adapters import to_named
from ultrathink_jax.lora.adapting import Frozen, adaptation_of
from ultrathink_jax.lora.freezing import place
from ultrathink_jax.models.language_model import LanguageModel, inference_config, logits, single_documents, variables
from ultrathink_jax.models.naming import leaf_at, places
from ultrathink_jax.types import Adapted, Parameters

_PROBE_TOKENS = 64
_LARGEST_DIFFERENCE = 1e-3  # of float32 logits, relative to their largest: a sum in another order


class Adapters(NamedTuple):
  """What an adapted run has trained.

  Attributes:
    config: of the run.
    params: what is trained, with the parts `lora` and `trained`.
    frozen: the base.
    weights: what the model reads of both.
  """

  config: Config
  params: Parameters
  frozen: Frozen
  weights: Adapted

  def in_full_precision(self, base: Base) -> Adapted:
    """Returns the weights over the base as it was before it was kept in few bits."""
    if self.config.lora.base_dtype == "float32":
      return self.weights
    whole = place(adaptation_of(self.config).trained, base.load(), self.params.get("trained", {}))
    return Adapted(whole, {}, self.weights.lora)

  def save(self, directory: Path, expert_layout: str) -> None:
    """Writes the adapters as PEFT reads them. Raises ConfigError where it would not compute the same."""
    config, adaptation = self.config, adaptation_of(self.config)
    family, _ = find_exact(config.model)
    named = to_named(adaptation.targets, config.lora, self.params.get("lora", {}), self.frozen.start)
    trained = {}
    whole = {each.path for each in adaptation.trained}
    for name, at in places(config.model, self.weights.params).items():
      if at.path in whole:
        leaf = np.asarray(leaf_at(self.weights.params, at.path))
        trained[name] = leaf if at.repeat is None else leaf[at.repeat]
    is_rslora = config.lora.scaling == "rslora"
    adapter = PeftAdapter(named, trained, is_rslora, str(config.checkpoint.init_from), config.lora.dropout)
    write_adapter(directory, config.model, family, adapter, expert_layout)
    log(f"[export] {directory} holds {len(named)} adapters for {config.checkpoint.init_from}, a {family.architecture}")


def compare_logits(model: ModelConfig, adapted: Adapted, merged: Parameters) -> str:
  """Returns by how much the logits of both differ on some tokens, in float32, for people.

  Raises:
    NumericsError: by more than sums in another order explain.
  """
  model = dataclasses.replace(inference_config(model), dtype="float32")
  tokens = jax.random.randint(jax.random.key(0), (1, _PROBE_TOKENS), 0, model.vocab_size)
  of = jax.jit(lambda weights: logits(LanguageModel(model).apply(variables(weights), tokens, single_documents(tokens))))
  first, second = np.asarray(of(adapted)), np.asarray(of(merged))
  difference, largest = np.abs(first - second).max(), np.abs(first).max()
  same = np.mean(first.argmax(-1) == second.argmax(-1))
  said = f"logits differ by {difference:.1e} at most, of {largest:.1f}; {same:.1%} of {_PROBE_TOKENS} tokens agree"
  if not difference <= _LARGEST_DIFFERENCE * largest:
    raise NumericsError(f"the merged model is another one: {said}")
  return said
