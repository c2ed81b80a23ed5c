"""What a run reports while it trains: `metrics.jsonl`, `evaluations.jsonl`, TensorBoard events and the console."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ultrathink_jax.parallel.processes import is_first

MOE_FORMATS = {"entropy": "{:.2f}", "max_expert": "{:.2f}", "dropped": "{:.1%}", "dead": "{}"}
MOE_NAMES = {"max_expert": "max"}  # shorter on the console


class MetricsWriter:
  """A context manager that records the steps and evaluations of one session of a run.

  Opening it drops what an earlier session recorded after `resume_step`: those steps are about to be made again. With
  `resume_step=0` it drops everything. A line that a kill tore is dropped too; all other bytes stay as they are.

  Values are Python, NumPy or JAX scalars; a nested value (moe/load) goes to the file only. Floats read back to the
  same bits. JSON has no NaN or infinity: a value that is not finite is written as null. Each line reaches the operating
  system before `write` returns, so only a power cut loses it.
  """

  def __init__(self, workdir: Path, resume_step: int, total_steps: int):
    workdir.mkdir(parents=True, exist_ok=True)
    self._total_steps = total_steps
    self._first: tuple[int, float] | None = None  # the first step written, which has waited for compilation
    self._files = {name: _open_after(workdir / name, resume_step) for name in ("metrics.jsonl", "evaluations.jsonl")}
    self._events = _EventFile(workdir / "tensorboard", resume_step)
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm(
        total=total_steps,
        initial=resume_step,
        miniters=1,
        dynamic_ncols=True,
        leave=False,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
      )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Records optimizer step `step`, counted from 1. `values` hold at least the keys that `format_step` reads."""
    values = _to_python(values)
    self._record("metrics.jsonl", step, values)
    line = format_step(step, self._total_steps, values)
    eta = self._eta(step)
    if self._bar is None:
      self.log(f"{line} eta={eta}" if eta else line)
      return
    self.log(line)
    self._bar.set_postfix_str(f"eta {eta}" if eta else "", refresh=False)
    self._bar.update(step - self._bar.n)

  def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
    """Records an evaluation made after `step` steps, with keys such as `evaluate/loss`."""
    values = _to_python(values)
    self._record("evaluations.jsonl", step, values)
    self.log(format_evaluation(step, values))

  def log(self, text: str) -> None:
    """Prints a line to standard output, above the progress bar where there is one."""
    if self._bar is None:
      print(text, flush=True)
    else:
      tqdm.write(text)
      sys.stdout.flush()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    for file in self._files.values():
      file.close()
    self._events.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _record(self, name: str, step: int, values: dict[str, Any]) -> None:
    text = json.dumps(_finite({"step": step, **values}), allow_nan=False)
    self._files[name].write(text.encode() + b"\n")
    self._events.write(step, {key: value for key, value in values.items() if isinstance(value, (int, float))})

  def _eta(self, step: int) -> str:
    """Returns the time left at the mean pace since the first step written here; empty before a second one."""
    now = time.monotonic()
    if self._first is None:
      self._first = (step, now)
    first_step, first_time = self._first
    if step <= first_step:
      return ""
    return format_duration((self._total_steps - step) * (now - first_time) / (step - first_step))


class _Silence(MetricsWriter):
  """Writes nothing: what stands for a writer where another process reports."""

  def __init__(self) -> None:
    pass

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    pass

  def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
    pass

  def log(self, text: str) -> None:
    pass

  def close(self) -> None:
    pass


def open_writer(workdir: Path, resume_step: int, total_steps: int) -> MetricsWriter:
  """Returns the writer of a run; in all processes but the first, one that writes nothing."""
  return MetricsWriter(workdir, resume_step, total_steps) if is_first() else _Silence()


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
  """Makes a package that is not imported yet seem not to be installed."""
  if name in sys.modules:
    yield
    return
  sys.modules[name] = None
  try:
    yield
  finally:
    del sys.modules[name]


class _EventFile:
  """One TensorBoard event file, flushed at every event.

  tensorboardX's own SummaryWriter pickles every scalar through a queue to a thread that flushes when it sees fit; its
  EventsWriter takes all scalars of a step in one event, in microseconds, and a killed run keeps them.
  """

  def __init__(self, directory: Path, resume_step: int):
    with _hidden("torch"):  # tensorboardX imports it where it is installed, for seconds and hundreds of megabytes
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2, summary_pb2

    directory.mkdir(exist_ok=True)
    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    # The name holds the start in seconds; the suffix keeps two sessions of the same second apart, and in order.
    self._writer = EventsWriter(str(directory / "events"), f".{resume_step:09d}")
    # TensorBoard hides earlier events from this step on.
    purge_step = resume_step + 1 if resume_step else 0
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=start))

  def write(self, step: int, scalars: dict[str, float]) -> None:
    values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def format_step(step: int, total_steps: int, values: Mapping[str, Any]) -> str:
  """Returns the console line of a step.

  Example:
    [step] step=120/2000 loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 moe=[entropy=0.97 max=0.18 dropped=0.0%] grad=0.83

  moe=[...] and dre=[...] appear where `values` have such keys; dre=[...] shows every scalar under `dre/` by its name.
  moe=[...] ends with dead=N where experts are dead, and with each group's share and entropy as knowledge=51%/0.98.
  """
  parts = [
    f"[step] step={step}/{total_steps}",
    f"loss={values['loss']:.4f}",
    f"ppl={_format_perplexity(values['loss'])}",
    f"toks/s={values['tokens_per_second']:,.0f}",
    f"lr={values['learning_rate']:.1e}",
  ]
  moe = _moe_parts(values)
  dre = [
    f"{key.removeprefix('dre/')}={value:.3g}"
    for key, value in values.items()
    if key.startswith("dre/") and not isinstance(value, (Mapping, list))
  ]
  parts += [f"{group}=[{' '.join(items)}]" for group, items in (("moe", moe), ("dre", dre)) if items]
  norm = values["grad_norm"]
  parts.append(f"grad={norm:.2f}" if norm == 0 or 0.01 <= abs(norm) < 1e4 else f"grad={norm:.1e}")
  return " ".join(parts)


def _moe_parts(values: Mapping[str, Any]) -> list[str]:
  parts = []
  for name, spelling in MOE_FORMATS.items():
    value = values.get(f"moe/{name}")
    if value is not None and (name != "dead" or value):
      parts.append(f"{MOE_NAMES.get(name, name)}={spelling.format(value)}")
  for key, share in values.items():
    if key.startswith("moe/") and key.endswith("/share"):
      group = key.split("/")[1]
      entropy = values.get(f"moe/{group}/entropy")
      parts.append(f"{group}={share:.0%}" + ("" if entropy is None else f"/{entropy:.2f}"))
  return parts


def format_evaluation(step: int, values: Mapping[str, Any]) -> str:
  """Returns the console line of an evaluation; bits/byte is left out where the data has no bytes."""
  loss = values["evaluate/loss"]
  line = f"[evaluate] step={step} loss={loss:.4f} ppl={_format_perplexity(loss)}"
  bits = values.get("evaluate/bits_per_byte")
  return line if bits is None else f"{line} bits/byte={bits:.4f}"


def format_duration(seconds: int | float) -> str:
  """Returns 45s, 3m12s, 2h05m or 3d04h."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  if seconds < 86400:
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
  return f"{seconds // 86400}d{seconds // 3600 % 24:02d}h"


def _format_perplexity(loss: int | float) -> str:
  perplexity = math.exp(loss) if loss < 700 else loss * math.inf  # exp(710) overflows; NaN stays NaN
  if perplexity < 1000:
    return f"{perplexity:.1f}"
  return f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.1e}"


def _open_after(path: Path, resume_step: int) -> Any:
  """Returns `path` open for unbuffered appending, without its lines after `resume_step` and its damaged lines."""
  if path.exists():
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_kept(line, resume_step)]
    if len(kept) < len(lines):
      temporary = path.with_name(path.name + ".tmp")
      with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
  return path.open("ab", buffering=0)


def _is_kept(line: bytes, resume_step: int) -> bool:
  if not line.endswith(b"\n"):
    return False
  try:
    return resume_step > 0 and json.loads(line)["step"] <= resume_step
  except (ValueError, KeyError, TypeError):
    return False


def _to_python(value: Any) -> Any:
  """Returns `value` with NumPy and JAX scalars and arrays as Python numbers and lists."""
  if isinstance(value, Mapping):
    return {key: _to_python(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_to_python(item) for item in value]
  return value.tolist() if hasattr(value, "tolist") else value


def _finite(value: Any) -> Any:
  """Returns `value` with None in place of every float that is not finite."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
