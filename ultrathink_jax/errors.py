"""Errors a user can cause, each with the exit code that tells a scheduler what to do next."""

import sys
import traceback

from ultrathink_jax.redaction import redact


class UserError(ValueError):
  """A mistake or a fault outside the program: one line for the user, no traceback."""

  exit_code = 1


class ConfigError(UserError):
  """A wrong flag, key, value or combination."""

  exit_code = 2


class DataError(UserError):
  """Missing, empty or unreadable data."""

  exit_code = 3


class CheckpointError(UserError):
  """A checkpoint or exported model that is missing, damaged or of another shape."""

  exit_code = 4


class NumericsError(UserError):
  """A loss or gradient that is not finite."""

  exit_code = 5


class PeerError(UserError):
  """Another process of the run that is lost, hangs or cannot be reached."""

  exit_code = 6


class Preempted(UserError):  # noqa: N818  (not an error)
  """A signal that asked the program to end, after what it was doing was saved."""

  exit_code = 75


INTERRUPTED_EXIT_CODE = 130


def report(error: BaseException, with_traceback: bool) -> int:
  """Returns the exit code of an error that ends the program, after it is printed: one line if a user can cause it."""
  if with_traceback or not isinstance(error, (UserError, KeyboardInterrupt)):
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
  if isinstance(error, (UserError, KeyboardInterrupt)):
    print(f"{describe(error)}\n", end="", file=sys.stderr)  # in one write, as other threads may print too
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED_EXIT_CODE
  return error.exit_code if isinstance(error, UserError) else 1


def describe(error: BaseException) -> str:
  """Returns an error as one line, without secrets."""
  if isinstance(error, KeyboardInterrupt):
    return "interrupted: the same command resumes from the last checkpoint"
  words = " ".join(redact(str(error)).split())
  if isinstance(error, Preempted):
    return f"stopped: {words}"
  return f"error: {words}" if isinstance(error, UserError) else f"{type(error).__name__}: {words}"
