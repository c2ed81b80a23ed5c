"""The processes of a run: how they find each other, what they wait for, and how they end together.

Every process runs the same program over the same mesh, each with devices of its own.
"""

import contextlib
import glob
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import jax
from jax._src import clusters, distributed  # JAX's search for a cluster and its coordination service, by no public name
from jaxlib import _jax

from ultrathink_jax.errors import ConfigError, PeerError, Preempted, describe, report
from ultrathink_jax.interruption import Interruption, Stopped
from ultrathink_jax.parallel import peers
from ultrathink_jax.parallel.service import ServiceProcess
from ultrathink_jax.parallel.stopping import Stopping

VARIABLES = {  # that stand for a flag where it is not given
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
_MEETING_SECONDS = 300
_HEARTBEAT_SECONDS = 30  # of JAX's own watch, which stands behind ours
_BARRIER_MILLISECONDS = 7 * 24 * 3600 * 1000  # a peer that is lost ends the wait, so that time need not
_VERDICT_SECONDS = 1.0
_LAST_WORDS_SECONDS = 5.0  # in which a process that ends for others writes down where it was

_watch: peers.Watch | None = None
_is_reported = False  # whether this process has said why it ends
_on_loss: Callable[[str], None] = lambda line: None


class Settings(NamedTuple):
  """Where processes meet, and who says so; what is None the cluster tells."""

  told_by: str
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def find_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings | None:
  """Returns how this process joins others, None where it is alone.

  `flags` are coordinator, num_processes and process_id, None where not given; their variables come second, and a
  cluster (SLURM, Open MPI, the metadata of a TPU) tells the rest. Raises ConfigError.
  """
  values = {name: environment.get(variable) for name, variable in VARIABLES.items()}
  values |= {name: value for name, value in flags.items() if value is not None}
  given = [f"--{name}={value}" for name, value in values.items() if value is not None]
  missing = [f"--{name}" for name, value in values.items() if value is None]
  cluster = _find_cluster(environment) if missing else None
  if missing and not cluster:
    if not given:
      return None
    raise ConfigError(f"{' '.join(given)} without {' and '.join(missing)}; processes meet by all three")
  told_by = cluster or ("flags" if any(value is not None for value in flags.values()) else "environment")
  settings = Settings(
    told_by, values["coordinator"], *(_integer(n, values[n]) for n in ("num_processes", "process_id"))
  )
  _check(settings)
  return None if settings.num_processes == 1 else settings


def _integer(name: str, value: str | int | None) -> int | None:
  try:
    return None if value is None else int(value)
  except ValueError as error:
    raise ConfigError(f"{VARIABLES[name]}={value!r} is not a number; it stands for --{name}") from error


def _check(settings: Settings) -> None:
  _, coordinator, count, index = settings
  if count is not None and count < 1:
    raise ConfigError(f"--num_processes={count} is not a number of processes; choose 1 or more")
  if count is not None and index is not None and not 0 <= index < count:
    raise ConfigError(f"--process_id={index} is outside 0 to {count - 1}, the ids of --num_processes={count}")
  if coordinator is not None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
      raise ConfigError(f"--coordinator={coordinator} is not HOST:PORT; name the machine of process 0 and a free port")


def _find_cluster(environment: Mapping[str, str]) -> str | None:
  """Returns the name of the cluster that started this process as one of several, or may have."""
  if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment:  # a task of srun
    return "SLURM"
  if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    return "Open MPI"
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
  if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
    return "TPU"
  # On the virtual machines of a Cloud TPU only its metadata tells whether there are more.
  has_chips = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
  if not hosts and has_chips and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in environment:
    return "TPU"
  return None


def initialize(flags: Mapping[str, Any], environment: Mapping[str, str]) -> None:
  """Joins the other processes, if there are any, and begins to watch them; before JAX looks for devices.

  Raises:
    ConfigError: flags or variables are wrong, or the cluster does not tell what they leave out.
    PeerError: not all processes come in time, or a port is taken.
  """
  global _watch
  settings = find_settings(flags, environment)
  if settings is None:
    return
  told_by, *where = settings
  devices = None
  if None in where:
    *where, devices = _ask_cluster(told_by, where)
    if "JAX_LOCAL_DEVICE_IDS" in environment:  # comes before what the cluster says
      devices = None
  coordinator, count, index = where
  if count == 1:
    return
  _watch = peers.meet(coordinator, count, index, _MEETING_SECONDS, _end)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM and leaves the process running
  # Process 0 must not host JAX's service: when it dies, the others would abort before they can say why.
  with mock.patch.object(_jax, "get_distributed_runtime_service", ServiceProcess):
    jax.distributed.initialize(
      coordinator,
      count,
      index,
      devices,
      cluster_detection_method="deactivate",
      initialization_timeout=_MEETING_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  if index == 0:
    machines = len(set(_watch.hosts))
    print(
      f"[setup] {count} processes on {machines} machine{'s'[: machines > 1]}, told by {told_by}; "
      f"this is the first, at {coordinator}",
      flush=True,
    )


def _ask_cluster(told_by: str, where: Sequence[Any]) -> tuple[str, int, int, Sequence[int] | None]:
  """Returns coordinator, number of processes, which one this is and its devices, None for all it sees."""
  try:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(*where, None, None, _MEETING_SECONDS)
  except Exception as error:  # what asking raises differs between clusters
    found, reason = (None, None, None, None), " ".join(str(error).split())[:300]
  else:
    reason = "JAX finds no cluster"
  if None in found[:3]:
    raise ConfigError(
      f"{told_by} does not tell where the processes meet: {reason}; "
      "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
    )
  return found


def is_first() -> bool:
  """Returns whether this is the process that prints, writes files and prepares data."""
  return distributed.global_state.process_id == 0


def num_processes() -> int:
  return distributed.global_state.num_processes


def num_on_this_machine() -> int:
  """Returns how many processes of the run share the memory of this machine."""
  return 1 if _watch is None else _watch.hosts.count(_watch.hosts[distributed.global_state.process_id])


def process_index() -> int:
  """Returns which of the processes this is."""
  return distributed.global_state.process_id


def stopping() -> Stopping | None:
  """Returns how the processes agree on where to stop, None where this one is alone."""
  return None if _watch is None else _watch.stopping


def barrier(name: str) -> None:
  """Returns when all processes have come to the barrier `name`; each name can be used once."""
  if _watch is not None:
    distributed.global_state.client.wait_at_barrier(name, _BARRIER_MILLISECONDS)


def said_by_first(name: str, text: str) -> str:
  """Returns what the first process says, in all of them; each name can be used once."""
  if _watch is None:
    return text
  client = distributed.global_state.client
  if is_first():
    client.key_value_set(f"said/{name}", text)
    return text
  return client.blocking_key_value_get(f"said/{name}", _BARRIER_MILLISECONDS)


def agreed(name: str, is_so: bool) -> bool:
  """Returns what the first process decides, in all of them; each name can be used once."""
  return said_by_first(name, str(is_so)) == "True"


@contextlib.contextmanager
def joined(
  flags: Mapping[str, Any], environment: Mapping[str, str], debug: bool, interruption: Interruption | None = None
) -> Iterator[None]:
  """Runs its body as one of the processes that `initialize` finds, which end together: when all are done or one fails.

  An error of one process, or Ctrl-C, is printed there and ends all with its exit code. A signal that `interruption`
  answers stops all after the same step, or ends all at once; `Preempted` is then raised in all.
  """
  global _watch, _is_reported
  preempted = None
  try:
    initialize(flags, environment)
    if _watch is not None and interruption is not None:
      interruption.is_alone = False
      interruption.tell, interruption.on_request = _watch.fail, _watch.stopping.request
    try:
      yield
    except (Preempted, Stopped) as error:  # in all processes alike
      preempted = error
    barrier("ultrathink_jax/leave")
  except BaseException as error:
    if _watch is None:
      raise
    if not isinstance(error, KeyboardInterrupt):
      time.sleep(_VERDICT_SECONDS)  # an error may follow from the loss of a peer, which the watch then reports
    _is_reported = True
    code = report(error, debug)
    _watch.fail(code, describe(error).removeprefix("error: "))
    _exit(code)
  if _watch is not None:
    jax.distributed.shutdown()
    _watch.close()
    _watch = None
  if preempted is not None:
    raise preempted


@contextlib.contextmanager
def on_loss(tell: Callable[[str], None]) -> Iterator[None]:
  """Calls `tell` with the line that says why when, in the body, a peer that is lost or hangs ends this process."""
  global _on_loss
  before, _on_loss = _on_loss, tell
  try:
    yield
  finally:
    _on_loss = before


@contextlib.contextmanager
def ending(code: int, line: str) -> Iterator[None]:
  """Ends this process, and all others, with an exit code and a line, after its body; from any thread."""
  global _is_reported
  _is_reported = True
  with _limited(code):
    if _watch is not None:
      _watch.fail(code, line)
    try:
      yield
    finally:
      print(f"error: {line}\n", end="", file=sys.stderr)
      _exit(code)


def _end(code: int, line: str) -> None:
  """Ends this process because of another one."""
  with _limited(code):
    if not _is_reported:
      print(f"{'stopped' if code >= Preempted.exit_code else 'error'}: {line}\n", end="", file=sys.stderr)
    if code == PeerError.exit_code:
      with contextlib.suppress(OSError):
        _on_loss(line)
    _exit(code)


@contextlib.contextmanager
def _limited(code: int) -> Iterator[None]:
  """Ends the process even where its body waits for a file or a pipe."""
  end = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (code,))
  end.daemon = True
  end.start()
  yield


def _exit(code: int) -> NoReturn:
  """Ends the process without the steps at exit, in which JAX waits for processes that may be gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
