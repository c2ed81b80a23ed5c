"""What each --mode of the command line does."""

from ultrathink_jax.modes.evaluating import evaluate
from ultrathink_jax.modes.looking import data, describe, diagnose, plan, tokenizer
from ultrathink_jax.modes.training import Invocation, train
from ultrathink_jax.modes.using import Export, export_model, generate, import_model

__all__ = [
  "Export",
  "Invocation",
  "data",
  "describe",
  "diagnose",
  "evaluate",
  "export_model",
  "generate",
  "import_model",
  "plan",
  "tokenizer",
  "train",
]
