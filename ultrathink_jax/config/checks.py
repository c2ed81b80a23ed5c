"""What sections of a configuration check, each a line for the user: what, the value, the rule, the fix."""

import difflib
from typing import Any

from ultrathink_jax.errors import ConfigError


def require_choice(section: str, config: Any, **choices: tuple[str, ...]) -> None:
  for key, allowed in choices.items():
    value = getattr(config, key)
    if value not in allowed:
      near = difflib.get_close_matches(str(value), allowed, 1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"{section}.{key}={value!r} is not one of {', '.join(allowed)}{hint}")


def require_at_least(section: str, config: Any, minimum: int | float, *keys: str) -> None:
  for key in keys:
    if not getattr(config, key) >= minimum:
      raise ConfigError(f"{section}.{key}={getattr(config, key)} is below {minimum}; choose {minimum} or more")


def require_positive(section: str, config: Any, *keys: str) -> None:
  for key in keys:
    if not getattr(config, key) > 0:
      raise ConfigError(f"{section}.{key}={getattr(config, key)} is not positive; choose a value above 0")


def require_fraction(section: str, config: Any, *keys: str) -> None:
  for key in keys:
    if not 0 <= getattr(config, key) < 1:
      raise ConfigError(f"{section}.{key}={getattr(config, key)} is outside [0, 1); choose a value from 0 to below 1")


def divisors(number: int) -> str:
  return ", ".join(str(k) for k in range(1, number + 1) if number % k == 0)
