"""What of a corpus is worth learning: filters, secrets, duplicates, and texts that models are tested with."""

from ultrathink_jax.config import QualityConfig
from ultrathink_jax.data.quality.decontamination import Contamination
from ultrathink_jax.data.quality.duplicates import clusters, signature
from ultrathink_jax.data.quality.filters import make_filter
from ultrathink_jax.data.quality.secrets import scrub
from ultrathink_jax.data.quality.verdict import Quality, Verdict, make_quality

__all__ = [
  "Contamination",
  "Quality",
  "QualityConfig",
  "Verdict",
  "clusters",
  "make_filter",
  "make_quality",
  "scrub",
  "signature",
]
