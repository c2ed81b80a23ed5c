"""Documents of a source, their tokens on disk, and packed batches that depend on the step alone."""

from ultrathink_jax.data.loader import Loader, validation_batches
from ultrathink_jax.data.prepare import PreparedData, open_prepared, prepare
from ultrathink_jax.data.sources import SOURCES
from ultrathink_jax.data.token_store import StoreInfo, TokenStore
from ultrathink_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
  "SOURCES",
  "Loader",
  "PreparedData",
  "StoreInfo",
  "TokenStore",
  "Tokenizer",
  "load_tokenizer",
  "open_prepared",
  "prepare",
  "validation_batches",
]
