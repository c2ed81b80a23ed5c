"""Secrets in what a run writes down, replaced by a marker: by their names, by what they look like, and by value.

Unlike a scrubber of documents it would rather replace too much than too little: a placeholder goes as well.
"""

from ultrathink_jax.redaction.redacting import REDACTED, redact

__all__ = ["REDACTED", "redact"]
