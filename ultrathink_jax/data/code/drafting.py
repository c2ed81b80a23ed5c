"""Reads files and writes their drafts beside the output, in as many processes as are worth it."""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.data.code.items import Span
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.code.reading import read_source
from ultrathink_jax.data.code.samples import Draft, Place, Sampler
from ultrathink_jax.data.code.scan import Found
from ultrathink_jax.data.code.tokens import TokenizerView
from ultrathink_jax.data.documents import plain
from ultrathink_jax.data.quality.duplicates import signature
from ultrathink_jax.errors import DataError
from ultrathink_jax.interruption import end_with_parent

_JOB_BYTES = 1024 * 1024
_JOB_FILES = 64
_PARALLEL_BYTES = 4 * 1024 * 1024  # below, processes take longer to start than to work
_SECONDS_BETWEEN_LINES = 10


class Report(NamedTuple):
  """What is known of a file; `reason` is why it is left out, "" if it is used, and then all else is there."""

  found: Found
  reason: str = ""
  sha256: str = ""
  licence: str = ""
  signature: bytes = b""
  tokens: int = 0
  cuts: tuple[Span, ...] = ()
  imports: tuple[str, ...] = ()
  functions: tuple[Place, ...] = ()
  tests: tuple[Place, ...] = ()
  num_items: dict[str, int] = {}  # noqa: RUF012, never changed
  left_out: dict[str, int] = {}  # noqa: RUF012, never changed
  secrets: dict[str, int] = {}  # noqa: RUF012, never changed
  has_errors: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
  """Some files that follow one another, and where their drafts go."""

  root: Path
  files: tuple[Found, ...]
  spool: Path
  options: CodeOptions
  tokenizer: TokenizerView

  def run(self) -> list[Report]:
    """Returns what is known of each file; the drafts of each that is used are a line of the spool."""
    sampler = Sampler(self.options, self.tokenizer)
    reports = []
    with open(self.spool, "w", encoding="utf-8") as spool:
      for found in self.files:
        report, drafts = _draft(self.root, found, self.options, sampler)
        reports.append(report)
        spool.write(json.dumps(drafts) + "\n")
    return reports


def plan_jobs(
  root: Path, files: Sequence[Found], folder: Path, options: CodeOptions, tokenizer: TokenizerView
) -> list[Job]:
  """Returns jobs of about 1 MiB, which together have all files in order."""
  jobs, part, num_bytes = [], [], 0
  for i, found in enumerate(files):
    part.append(found)
    num_bytes += found.num_bytes
    if num_bytes >= _JOB_BYTES or len(part) == _JOB_FILES or i == len(files) - 1:
      jobs.append(Job(root, tuple(part), folder / f"{len(jobs):06d}.jsonl", options, tokenizer))
      part, num_bytes = [], 0
  return jobs


def run_jobs(jobs: Sequence[Job], options: CodeOptions, log: Callable[[str], None]) -> list[Report]:
  """Returns what is known of each file of each job.

  Raises:
    DataError: a process was killed.
  """
  num_files = sum(len(job.files) for job in jobs)
  num_bytes = sum(found.num_bytes for job in jobs for found in job.files)
  workers = options.workers or (os.cpu_count() or 1 if num_bytes >= _PARALLEL_BYTES else 1)
  reports: list[Report] = []
  told = time.monotonic()
  for part in _results(jobs, min(workers, len(jobs))):
    reports += part
    if time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
      told = time.monotonic()
      log(f"code: read {len(reports)} of {num_files} files")
  return reports


def read_drafts(job: Job) -> Iterator[list[Draft]]:
  """Yields the drafts of each file of a job that has run, [] for one that is left out."""
  with open(job.spool, encoding="utf-8") as spool:
    for line in spool:
      yield [Draft(*fields)._replace(span=tuple(fields[2])) for fields in json.loads(line)]


def _results(jobs: Sequence[Job], workers: int) -> Iterator[list[Report]]:
  if workers <= 1:
    yield from map(Job.run, jobs)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent) as pool:
    try:
      yield from pool.map(Job.run, jobs)
    except concurrent.futures.process.BrokenProcessPool as error:
      raise DataError("a process that reads code was killed; give it more memory, or set workers=1") from error
    finally:
      pool.shutdown(cancel_futures=True)


def _draft(root: Path, found: Found, options: CodeOptions, sampler: Sampler) -> tuple[Report, list[Any]]:
  source = read_source(root, found, options)
  if isinstance(source, str):
    return Report(found, source), []
  sampled = sampler.sample(found.name, source.content)
  if isinstance(sampled, str):
    return Report(found, sampled), []
  report = Report(
    found=found,
    sha256=source.sha256,
    licence=source.licence,
    signature=signature(plain(found.name, source.content.decode())),
    tokens=sampled.tokens,
    cuts=sampled.cuts,
    imports=sampled.imports,
    functions=tuple(sampled.functions),
    tests=tuple(sampled.tests),
    num_items=sampled.num_items,
    left_out=sampled.left_out,
    secrets=dict(collections.Counter(source.secrets)),
    has_errors=sampled.has_errors,
  )
  return report, sampled.drafts
