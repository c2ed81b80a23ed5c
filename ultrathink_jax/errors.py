"""Errors a user can cause, each with the exit code that tells a scheduler what to do next."""


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


INTERRUPTED_EXIT_CODE = 130
