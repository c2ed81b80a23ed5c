"""What the programs have in common: reading flags, and of those that measure our side alone the model and the page."""

import sys
from collections.abc import Iterable, Sequence

from absl import flags
from ml_collections import config_flags

from benchmarks.environment import cpu_name, versions, write_page
from benchmarks.shapes import PATTERNS, SHAPES, make_config, with_batch
from ultrathink_jax.config import Config, from_mapping
from ultrathink_jax.parallel.devices import describe_devices


def define(argv: Sequence[str]) -> tuple[flags.FlagValues, flags.FlagHolder]:
  """Returns the common flags, not yet read, and the holder of --config."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    "config", None, "A configuration, as configs/nano.py, instead of --shape.", flag_values=values, sys_argv=list(argv)
  )
  flags.DEFINE_enum("shape", "tiny", SHAPES, "See benchmarks/shapes.py.", flag_values=values)
  flags.DEFINE_enum("model", "dense", list(PATTERNS), "The kind of blocks of the shape.", flag_values=values)
  flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16"), "Of the shape's activations.", flag_values=values)
  flags.DEFINE_integer("batch_size", None, "Sequences, instead of the shape's.", flag_values=values)
  flags.DEFINE_integer("sequence_length", None, "Tokens, instead of the shape's.", flag_values=values)
  flags.DEFINE_bool("write", False, "Also write the page to benchmarks/results/.", flag_values=values)
  return values, holder


def parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
  """Reads the flags. --help, and a flag that is wrong, print what there is to say and end the program."""
  if {"--help", "-h"} & set(argv[1:]):
    print(sys.modules["__main__"].__doc__, values.get_help(), sep="\n")
    raise SystemExit(0)
  try:
    rest = values(list(argv))[1:]
  except flags.Error as error:
    raise _usage_error(str(error)) from error
  if rest:
    raise _usage_error(f"{rest[0]!r} is not a flag; write --name=value")


def require(name: str, given: Sequence[str], allowed: Iterable[str]) -> None:
  """Ends the program if one of the values that were given to a flag is not allowed."""
  for value in given:
    if value not in allowed:
      raise _usage_error(f"--{name}: {value!r} is not one of {', '.join(allowed)}")


def _usage_error(words: str) -> SystemExit:
  print(f"error: {words}; --help lists the flags", file=sys.stderr)
  return SystemExit(2)


def read(values: flags.FlagValues, holder: flags.FlagHolder, argv: Sequence[str]) -> tuple[str, Config]:
  """Returns the name of the model the flags ask for, and its configuration."""
  parse(values, argv)
  if holder.value is not None:
    name = config_flags.get_config_filename(values["config"]).rsplit("/", 1)[-1].removesuffix(".py")
    config = from_mapping(holder.value.to_dict())
  else:
    name = values.shape if values.shape == "ultra3b" else f"{values.shape} {values.model} {values.dtype}"
    config = make_config(values.shape, values.model, values.dtype)
  return name, with_batch(config, values.batch_size, values.sequence_length)


def hardware() -> str:
  """Returns the kind and number of devices, or the processor's name."""
  devices = describe_devices()
  return cpu_name() if devices.platform == "cpu" else f"{devices.kind} x{devices.count}"


def publish(name: str, lines: Sequence[str], is_written: bool) -> None:
  """Prints the page and, if asked for, writes it to benchmarks/results/."""
  page = "\n".join([f"{hardware()}; {versions('jax', 'jaxlib', 'flax')}", "", *lines])
  print(page)
  if is_written:
    print(f"[written] {write_page(name, hardware(), page)}")
