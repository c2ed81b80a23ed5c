"""The command line: flags, config, dispatch by --mode.

    python -m ultrathink_jax.main --config=configs/NAME.py --workdir=DIR [--mode=MODE] [--config.section.key=value ...]

Mode data shows what training would read, which needs no device.

Heavy imports wait until the command line is known to be right.
"""

import contextlib
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from ultrathink_jax import logs
from ultrathink_jax.config import Config, from_mapping
from ultrathink_jax.errors import ConfigError, UserError, report
from ultrathink_jax.interruption import Interruption

_NEED_NO_CONFIG = ("import", "export")
_OF_SEVERAL_PROCESSES = ("train", "evaluate", "data")
_NOBODY_READS = 141  # as a shell says of a program that SIGPIPE ended
_STOPPABLE = ("train", "sweep")  # that end by a signal with what they did saved
MODES = (
  *_OF_SEVERAL_PROCESSES,
  *("tokenizer", "generate", "describe", "diagnose", "plan", "sweep"),
  *_NEED_NO_CONFIG,
)


def _define_flags(argv: list[str]) -> tuple[flags.FlagValues, flags.FlagHolder]:
  """Returns the flags and the one that holds the configuration."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", None, "Path of a configuration, as configs/nano.py.", flag_values=values, sys_argv=argv
  )
  flags.DEFINE_string(
    "workdir", None, "Where the run lives; by default runs/NAME of configs/NAME.py.", flag_values=values
  )
  flags.DEFINE_enum("mode", "train", MODES, "What to do.", flag_values=values)
  flags.DEFINE_multi_string("prompt", [], "Text to complete (mode generate); may be repeated.", flag_values=values)
  flags.DEFINE_string("prompt_file", None, "File whose whole text is one more prompt.", flag_values=values)
  flags.DEFINE_string("source", None, "Hugging Face or PEFT directory (mode import).", flag_values=values)
  flags.DEFINE_string("output", None, "Directory (mode export) or .md file (mode plan) to write.", flag_values=values)
  flags.DEFINE_string(
    "family", None, "model_type to write (mode export); by default the plainest that is exact.", flag_values=values
  )
  flags.DEFINE_string("base", None, "Of a PEFT adapter (mode import): a workdir or a directory.", flag_values=values)
  flags.DEFINE_boolean(
    "merge", False, "Write the whole model of an adapted run (mode export), not its adapters.", flag_values=values
  )
  layouts = ("per_expert", "fused")
  flags.DEFINE_enum("expert_layout", layouts[0], layouts, "Of exported adapters of experts.", flag_values=values)
  flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where several processes meet: process 0's machine.", flag_values=values
  )
  flags.DEFINE_integer("num_processes", None, "How many processes make the run.", flag_values=values)
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=values)
  flags.DEFINE_string(
    "topology", None, "Devices to plan for (mode plan), as v5p:4x4x4 or h200:8; mesh.slices times.", flag_values=values
  )
  flags.DEFINE_float("price_per_device_hour", None, "Dollars (mode plan).", flag_values=values)
  flags.DEFINE_boolean("search", False, "Plan the best mesh, remat and micro-batches.", flag_values=values)
  flags.DEFINE_integer("search_compiles", 4, "How many of the best estimates to compile.", 1, flag_values=values)
  flags.DEFINE_boolean(
    "force", False, "Go on with a run by a configuration that differs from its own.", flag_values=values
  )
  flags.DEFINE_boolean(
    "allow_fresh_start", False, "Begin anew where every checkpoint is damaged; they are kept aside.", flag_values=values
  )
  flags.DEFINE_string("profile_steps", None, "FIRST:LAST, steps to trace and sum up (mode train).", flag_values=values)
  flags.DEFINE_multi_string(
    "sweep",
    [],
    "KEY=VALUE,VALUE,... to try (mode sweep), or KEY=log:LOW:HIGH and KEY=linear:LOW:HIGH to draw from; repeatable.",
    flag_values=values,
  )
  flags.DEFINE_integer("sweep_random", 0, "How many trials to draw; 0: all combinations.", 0, flag_values=values)
  flags.DEFINE_integer("sweep_seed", 0, "Of the draws.", 0, flag_values=values)
  flags.DEFINE_integer("sweep_parallel", 1, "Trials at a time.", 1, flag_values=values)
  flags.DEFINE_boolean("debug", False, "Show the traceback of errors a user can cause.", flag_values=values)
  return values, config


def main(argv: list[str] | None = None) -> None:
  """Runs one mode and exits with a documented code."""
  argv = sys.argv if argv is None else argv
  try:
    code = _run(argv)
  except (UserError, KeyboardInterrupt) as error:
    logs.record_error(error)
    code = report(error, "--debug" in argv)
  except BrokenPipeError:
    code = _NOBODY_READS
  logs.close()
  try:
    sys.stdout.flush()
  except BrokenPipeError:  # whoever read it has enough, as head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(code)


def _run(argv: list[str]) -> int:
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that configs can import configs.base anywhere
  values, holder = _define_flags(argv)
  if any(argument in ("-h", "--help") for argument in argv):
    print(f"{__doc__}\n{values.get_help()}\nEvery key of --config, with its unit and default: configs/base.py")
    return 0
  config = _parse(argv, values, holder)
  if values.mode in _NEED_NO_CONFIG:
    _convert(values, config)
    return 0
  workdir = Path(values.workdir or Path("runs") / Path(config_flags.get_config_filename(values["config"])).stem)
  with Interruption() if values.mode in _STOPPABLE else contextlib.nullcontext() as interruption:
    return _dispatch(argv, values, config, workdir, interruption)


def _dispatch(
  argv: list[str], values: flags.FlagValues, config: Config, workdir: Path, interruption: Interruption | None
) -> int:
  """Runs a mode that has a configuration and returns the exit code."""
  prompts = _prompts(values) if values.mode == "generate" else []
  from ultrathink_jax.parallel import processes
  from ultrathink_jax.parallel.devices import configure_jax

  configure_jax()
  places = {name: values[name].value for name in processes.VARIABLES}
  if values.mode in _OF_SEVERAL_PROCESSES:
    with processes.joined(places, os.environ, values.debug, interruption):
      logs.configure(workdir if values.mode == "train" else None, processes.is_first())
      from ultrathink_jax import modes

      if values.mode == "train":
        flags_of_train = values.force, values.allow_fresh_start, values.profile_steps
        modes.train(config, workdir, modes.Invocation(argv, interruption, *flags_of_train))
      else:
        getattr(modes, values.mode)(config, workdir)
    return 0
  if given := [f"--{name}={value}" for name, value in places.items() if value is not None]:
    raise ConfigError(f"mode {values.mode} runs in one process; leave {' '.join(given)} away")
  logs.configure(None, True)
  if values.mode == "sweep":
    return _sweep(argv, values, config, workdir, interruption)
  from ultrathink_jax import modes

  if values.mode == "generate":
    modes.generate(config, workdir, prompts)
  elif values.mode == "plan":
    modes.plan(config, workdir, _plan_request(values), Path(values.output) if values.output else None)
  else:
    getattr(modes, values.mode)(config, workdir)
  return 0


def _sweep(argv: list[str], values: flags.FlagValues, config: Config, workdir: Path, interruption: Interruption) -> int:
  """Runs mode sweep and returns the exit code."""
  from ultrathink_jax import sweep

  request = sweep.Request(tuple(values.sweep), values.sweep_random, values.sweep_seed, values.sweep_parallel)
  own = sweep.trial_flags(argv[1:])
  make_config = lambda more: _parse([argv[0], *own, *more], *_define_flags([argv[0], *own, *more]))
  return sweep.sweep(request, config, workdir, own, make_config, interruption, logs.log)


def _plan_request(values: flags.FlagValues) -> Any:
  """Returns what mode plan is asked for."""
  from ultrathink_jax.plan.planning import Request

  if values.topology is None:
    raise ConfigError("mode plan needs --topology=KIND:SHAPE, as v5p:4x4x4, v6e:16x16 or h200:8")
  return Request(values.topology, values.price_per_device_hour, values.search, values.search_compiles)


def _convert(values: flags.FlagValues, config: Config) -> None:
  """Runs mode import or export."""
  other = "source" if values.mode == "import" else "output"
  for name in ("workdir", other):
    if not values[name].value:
      raise ConfigError(f"mode {values.mode} needs --{name}=DIR")
  from ultrathink_jax import modes
  from ultrathink_jax.parallel.devices import configure_jax

  configure_jax()
  logs.configure(None, True)
  if values.mode == "import":
    modes.import_model(config, Path(values.source), Path(values.workdir), values.base)
  else:
    wanted = modes.Export(values.family, values.merge, values.expert_layout)
    modes.export_model(Path(values.workdir), Path(values.output), wanted)


def _parse(argv: list[str], values: flags.FlagValues, holder: flags.FlagHolder) -> Config:
  """Returns the checked configuration of a command line. Raises ConfigError for any flag or key that is wrong."""
  try:
    rest = values(argv)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    raise ConfigError(_explain(error, argv)) from error
  if rest[1:]:
    raise ConfigError(f"{rest[1]!r} is not a flag; write --name=value")
  if holder.value is None and values.mode in _NEED_NO_CONFIG:
    return from_mapping(import_module("configs.base").get_config().to_dict())
  if holder.value is None:
    raise ConfigError("--config is missing; try --config=configs/nano.py")
  return from_mapping(holder.value.to_dict())


def _explain(error: Exception, argv: list[str]) -> str:
  """Returns one line for what the flag parsers raise; for a key that does not exist, which argument it was in."""
  words = str(error.args[0] if error.args else error).replace("\\", "").replace("\n", " ")
  if "Traceback" in words:  # of what get_config raised; its last part says why
    return f"--config: {words.rsplit('Error: ', 1)[-1]}"
  missing = re.match(r"['\"]*(\w+)['\"]", words)
  if not isinstance(error, (AttributeError, KeyError)) or missing is None:
    return words
  key, near = missing.group(1), re.search(r'Did you mean "(\w+)"', words)
  about = next((argument for argument in argv if f".{key}" in argument.split("=")[0]), "--config")
  hint = f"; did you mean {near.group(1)!r}?" if near else "; configs/base.py lists every key"
  return f"{about}: there is no key {key!r}{hint}"


def _prompts(values: flags.FlagValues) -> list[str]:
  prompts = list(values.prompt)
  if values.prompt_file:
    try:
      prompts.append(Path(values.prompt_file).read_text())
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f"--prompt_file={values.prompt_file} cannot be read: {error}") from error
  if not prompts:
    raise ConfigError("mode generate needs --prompt=TEXT (repeatable) or --prompt_file=PATH")
  return prompts


def allocator_settings() -> dict[str, str]:
  """Returns environment variables that make memory on this system faster; the C library reads them as a process begins.

  XLA on CPU takes the buffers of a step from malloc and gives them back after it. With large pages, and with memory
  that stays with the process, a step takes a quarter less time: otherwise the system hands out, and clears, the same
  hundreds of megabytes again and again.
  """
  offer = Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if "GLIBC_TUNABLES" in os.environ or not offer.exists() or "[madvise]" not in offer.read_text():
    return {}
  settings = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**40}
  return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())}


def console() -> None:
  """Runs `main` as a program of its own, restarted once with allocator settings where there are any."""
  settings = allocator_settings()
  if settings:
    os.environ |= settings
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  main()


if __name__ == "__main__":
  console()
