"""Mode sweep: one run for each of several configurations, and which of them came out best."""

from ultrathink_jax.sweep.running import sweep
from ultrathink_jax.sweep.trials import Request, trial_flags

__all__ = ["Request", "sweep", "trial_flags"]
