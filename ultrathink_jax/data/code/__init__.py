"""Samples for training made of a source tree."""

from ultrathink_jax.data.code.build import build_code_data
from ultrathink_jax.data.code.corpus import code_corpus
from ultrathink_jax.data.code.options import CodeOptions, make_options
from ultrathink_jax.data.code.tokens import CountedTokens, TokenizerView

__all__ = ["CodeOptions", "CountedTokens", "TokenizerView", "build_code_data", "code_corpus", "make_options"]
