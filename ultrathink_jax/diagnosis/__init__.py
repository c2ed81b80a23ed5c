"""Mode diagnose: what a configuration amounts to, and what its first steps on synthetic tokens are like."""

from ultrathink_jax.diagnosis.diagnosing import diagnose
from ultrathink_jax.diagnosis.text import format_diagnosis

__all__ = ["diagnose", "format_diagnosis"]
