"""Prints tokens per second of ours and of PyTorch with transformers, and their ratio.

    python -m benchmarks.compare --shapes=tiny --models=dense,moe,mamba,hybrid --dtypes=float32 --what=train --write

How it is kept fair: benchmarks/peers.py says what the peer is given. Both sides have the same sizes (the numbers of
parameters must agree), the same tokens, the same threads and the same environment. Each contestant lives in a process
of its own that is warm (compiled, and run at least three times) and blocked on a pipe, using no processor, while
another one runs. Ours meets the forms of the peer one after another, so that no more than two models are in memory.
The two take turns: a round lets each run for --seconds, and the ratio is taken round by round, so that whatever else
the machine does hits both of them. The peer is its best form: that of the highest median.
"""

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from absl import flags

from benchmarks import environment, options
from benchmarks.shapes import PATTERNS, SIZES, make_config, with_batch
from ultrathink_jax.config import Config

OURS = "ours"
EXPERT_FORMS = {"train": ("eager", "grouped_mm"), "decode": ("eager", "grouped_mm", "batched_mm")}  # of Mixtral
_FACTS = {
  "parameters": "{:,} parameters",
  "first_loss": "first loss {:.3f}",
  "optimizer": "{} AdamW",
  "compile_seconds": "compiled in {:.1f} s",
}
_FIRST_TOKENS = 16  # of the shorter of the two generations whose difference is decoding


class Case(NamedTuple):
  """One row of the table."""

  task: str  # train or decode
  shape: str
  kind: str
  dtype: str
  config: Config
  prompt_tokens: int  # of decoding
  new_tokens: int

  @property
  def title(self) -> str:
    rows = f"{self.config.train.batch_size} x {self.config.train.sequence_length}"
    if self.task == "decode":
      rows = f"{self.config.train.batch_size} x ({self.prompt_tokens} + {self.new_tokens})"
    return f"{self.task} {self.shape} {self.kind}, {rows} tokens, {self.dtype}"


class Contestant(NamedTuple):
  """Something that runs a case."""

  name: str
  side: str  # OURS or torch
  experts: str | None = None
  is_compiled: bool = False


class Outcome(NamedTuple):
  """What came of a case.

  Attributes:
    rounds: (ours, theirs) of each round, tokens per second, by form of the peer.
    alone: ours where no form of the peer runs.
    facts: what contestants say of themselves.
  """

  rounds: dict[str, list[tuple[float, float]]]
  alone: list[float]
  facts: dict[str, dict[str, Any]]
  failures: dict[str, str]

  @property
  def best_peer(self) -> str | None:
    return max(self.rounds, key=lambda name: statistics.median(theirs for _, theirs in self.rounds[name]), default=None)

  @property
  def speeds(self) -> dict[str, list[float]]:
    """Tokens per second by contestant; ours are those of the rounds with the best form of the peer."""
    best = self.best_peer
    ours = self.alone if best is None else [mine for mine, _ in self.rounds[best]]
    return {OURS: ours} | {name: [theirs for _, theirs in rounds] for name, rounds in self.rounds.items()}

  @property
  def round_ratios(self) -> list[float]:
    return [mine / theirs for mine, theirs in self.rounds[self.best_peer]]


def contestants(case: Case) -> list[Contestant]:
  """Returns ours and every form of the peer, in the order in which it meets them."""
  found = [Contestant(OURS, OURS)]
  for is_compiled in (False, True) if case.task == "train" else (False,):
    for experts in EXPERT_FORMS[case.task] if case.kind == "moe" else (None,):
      name = f"torch {'compiled' if is_compiled else 'eager'}" + (f", {experts} experts" if experts else "")
      found.append(Contestant(name, "torch", experts, is_compiled))
  return found


def _build(case: Case, contestant: Contestant) -> Any:
  """Returns what runs the case in this process; only its own side is imported."""
  batch_size = case.config.train.batch_size
  if contestant.side == OURS:
    from benchmarks.ours import OurDecoding, OurTraining
    from ultrathink_jax.parallel.devices import configure_jax

    configure_jax()
    if case.task == "train":
      return OurTraining(case.config)
    return OurDecoding(case.config, batch_size, case.prompt_tokens, case.new_tokens, _FIRST_TOKENS)
  from benchmarks.peers import TorchDecoding, TorchTraining

  if case.task == "train":
    return TorchTraining(case.config, contestant.experts, contestant.is_compiled)
  return TorchDecoding(case.config, contestant.experts, batch_size, case.prompt_tokens, case.new_tokens, _FIRST_TOKENS)


def _serve(connection: Connection, case: Case, contestant: Contestant) -> None:
  """Answers each number of seconds that comes in with the tokens per second of about so long a run."""
  try:
    run = _build(case, contestant)
    run(1)
    begun = time.perf_counter()
    run(1)
    one_call = time.perf_counter() - begun
    connection.send(run.facts)
    while (seconds := connection.recv()) is not None:
      calls = max(1, round(seconds / one_call))
      begun = time.perf_counter()
      connection.send(run.tokens_per_call * calls / run(calls))
      one_call = (time.perf_counter() - begun) / calls
  except Exception as error:  # a contestant that cannot run is a line of the page, not the end of the others
    connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def compare(case: Case, rounds: int, seconds: float) -> Outcome:
  """Returns what every contestant reached. Raises RuntimeError where ours does not run."""
  outcome = Outcome({}, [], {}, {})
  ours, *peers = contestants(case)
  with _running(case, ours) as (first, facts):
    if isinstance(facts, Exception):
      raise RuntimeError(f"{case.title}: ours does not run: {_line(facts)}")
    outcome.facts[ours.name] = facts
    for peer in peers:
      with _running(case, peer) as (second, facts):
        try:
          outcome.rounds[peer.name] = _meet(first, second, outcome.facts[ours.name], facts, rounds, seconds)
          outcome.facts[peer.name] = facts
        except _PeerError as error:  # a form that cannot run is a line of the page, not the end of the others
          outcome.failures[peer.name] = str(error)
    if not outcome.rounds:
      outcome.alone.extend(_turn(first, seconds) for _ in range(rounds))
  return outcome


class _PeerError(Exception):
  """Why a form of the peer does not run, one line."""


def _meet(
  ours: Connection, peer: Connection, our_facts: dict[str, Any], facts: Any, rounds: int, seconds: float
) -> list[tuple[float, float]]:
  """Returns (ours, theirs) of each round."""
  if isinstance(facts, Exception):
    raise _PeerError(_line(facts))
  if facts["parameters"] != our_facts["parameters"]:
    raise _PeerError(f"not the same model, it has {facts['parameters']} parameters and ours {our_facts['parameters']}")
  results = []
  for _ in range(rounds):
    mine = _turn(ours, seconds)
    try:
      results.append((mine, _turn(peer, seconds)))
    except RuntimeError as error:
      raise _PeerError(_line(error)) from error
  return results


@contextlib.contextmanager
def _running(case: Case, contestant: Contestant) -> Iterator[tuple[Connection, Any]]:
  """Gives the connection to a warm contestant in a process of its own, and its facts or why it does not run."""
  context = multiprocessing.get_context("spawn")
  connection, other_end = context.Pipe()
  process = context.Process(target=_serve, args=(other_end, case, contestant), daemon=True)
  process.start()
  other_end.close()
  try:
    yield connection, _receive(connection)
  finally:
    with contextlib.suppress(OSError):  # it has ended by itself
      connection.send(None)
    process.join(timeout=30)
    process.kill()
    process.join()


def _turn(connection: Connection, seconds: float) -> float:
  with contextlib.suppress(OSError):  # its process has ended, which the answer says
    connection.send(seconds)
  answer = _receive(connection)
  if isinstance(answer, Exception):
    raise answer
  return answer


def _line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)


def _receive(connection: Connection) -> Any:
  """Returns the next answer, an exception where the process has ended instead (killed for memory, say)."""
  try:
    return connection.recv()
  except (EOFError, OSError):
    return RuntimeError("its process ended without an answer")


def page(outcomes: dict[Case, Outcome]) -> str:
  """Returns the ratios, then what each contestant did."""
  ratios, details, notes = [], [], []
  for case, outcome in outcomes.items():
    best = outcome.best_peer
    mine = statistics.median(outcome.speeds[OURS])
    row = [case.title, f"{mine:,.0f}"]
    if best is None:
      ratios.append([*row, "none runs", "", "", ""])
    else:
      theirs = statistics.median(outcome.speeds[best])
      by_round = outcome.round_ratios
      spread = f"{statistics.median(by_round):.2f} ({min(by_round):.2f} - {max(by_round):.2f})"
      ratios.append([*row, f"{theirs:,.0f}", best, f"{mine / theirs:.2f}", spread])
    for name, speeds in outcome.speeds.items():
      facts = outcome.facts[name]
      said = ", ".join(text.format(facts[key]) for key, text in _FACTS.items() if key in facts)
      details.append([case.title, name, environment.spread(speeds), said])
    notes += [f"- {case.title}: {name} does not run: {reason}" for name, reason in outcome.failures.items()]
  header = ["case", "ours", "best torch", "which", "ratio of medians", "median of the rounds' ratios (range)"]
  parts = [
    f"{environment.cpu_name()}; "
    + environment.versions("jax", "flax", "torch", "transformers")
    + f"; {environment.num_cores()} threads each; GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}; "
    f"load before {os.getloadavg()[0]:.1f}",
    "Tokens per second, medians over rounds; "
    "embedding and output projection are " + _tying(outcomes) + " on both sides.",
    environment.table(header, ratios),
    environment.table(["case", "contestant", "tokens/s, median (range)", "facts"], details),
    "\n".join(notes),
    _maxtext(),
  ]
  return "\n\n".join(filter(None, parts))


def _tying(outcomes: dict[Case, Outcome]) -> str:
  ties = {case.config.model.tie_embeddings for case in outcomes}
  return " or ".join("tied" if tied else "separate" for tied in sorted(ties))


def _maxtext() -> str:
  if find_spec("maxtext") or find_spec("MaxText"):
    return "MaxText is installed, but has no interface to time single steps: run its own trainer on the same shape."
  return "MaxText is not installed: not compared."


def _parse(argv: Sequence[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  define = lambda kind, *args, **more: getattr(flags, f"DEFINE_{kind}")(*args, flag_values=values, **more)
  define("list", "shapes", ["tiny"], f"Of {', '.join(SIZES)}.")
  define("list", "models", list(PATTERNS), f"Of {', '.join(PATTERNS)}.")
  define("list", "dtypes", ["float32", "bfloat16"], "Of float32, bfloat16.")
  define("list", "what", ["train", "decode"], "Of train, decode.")
  define("integer", "rounds", 5, "Turns of each contestant.", lower_bound=1)
  define("float", "seconds", 2.0, "About how long a turn lasts.", lower_bound=0)
  define("integer", "batch_size", None, "Instead of the shape's, when training.")
  define("integer", "sequence_length", None, "Instead of the shape's.")
  define("list", "decode_batches", ["1", "8"], "Sequences decoded at once.")
  define("integer", "prompt_tokens", 32, "Of each sequence, when decoding.", lower_bound=2)
  define("integer", "new_tokens", 64, "Of each sequence, when decoding.", lower_bound=1)
  define("bool", "write", False, "Also write the page to benchmarks/results/.")
  options.parse(values, argv)
  choices = {"shapes": SIZES, "models": PATTERNS, "dtypes": ("float32", "bfloat16"), "what": ("train", "decode")}
  for name, allowed in choices.items():
    options.require(name, values[name].value, allowed)
  return values


def cases(values: flags.FlagValues) -> list[Case]:
  """Returns the cases that the flags ask for."""
  found = []
  for task in values.what:
    batches = [values.batch_size] if task == "train" else [int(batch) for batch in values.decode_batches]
    for shape in values.shapes:
      for dtype in values.dtypes:
        for kind in values.models:
          for batch in batches:
            config = with_batch(make_config(shape, kind, dtype), batch, values.sequence_length)
            found.append(Case(task, shape, kind, dtype, config, values.prompt_tokens, values.new_tokens))
  return found


def main(argv: Sequence[str]) -> None:
  values = _parse(argv)
  environment.use_product_settings()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves a GPU's memory to the peer
  outcomes: dict[Case, Outcome] = {}
  for case in cases(values):
    print(f"[case] {case.title}", flush=True)
    outcomes[case] = outcome = compare(case, values.rounds, values.seconds)
    for name, speeds in outcome.speeds.items():
      print(f"  {name}: {environment.spread(speeds)} tokens/s", flush=True)
    for name, reason in outcome.failures.items():
      print(f"  {name} does not run: {reason}", flush=True)
  text = page(outcomes)
  print(f"\n{text}")
  if values.write:
    device = next(iter(outcomes.values())).facts[OURS]["device"]
    hardware = environment.cpu_name() if device == "cpu" else device
    print(f"[written] {environment.write_page('compare', hardware, text)}")


if __name__ == "__main__":
  main(sys.argv)
