"""Builds a token store from the shards of a corpus: read, checked, tokenized and written in parallel, and resumable.

Shards are put together to tasks of 64 MiB at most, in order. A task writes its own files and marks itself finished by
the last of them, so that a build that is killed goes on with the tasks that are left, and the outcome does not depend
on how many processes there were.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ultrathink_jax.data.chat import ChatTemplate
from ultrathink_jax.data.documents import BadRecordError, Document, Record, Reject, Shard, excerpt, score
from ultrathink_jax.data.formats import make_format
from ultrathink_jax.data.quality import Quality, clusters
from ultrathink_jax.data.sentence_piece import SentencePieceTokenizer
from ultrathink_jax.data.shard_writer import Kept, ShardWriter, bad_entry
from ultrathink_jax.data.token_store import INDEX, SPLITS, fingerprint, tokens_dtype
from ultrathink_jax.data.tokenizer import load_tokenizer
from ultrathink_jax.errors import DataError
from ultrathink_jax.interruption import end_with_parent

_TASK_BYTES = 64 * 1024 * 1024
_MIN_TASKS = 16  # of smaller ones where there is less, so that every process has some
_BY_NAME = ""  # the split of shards whose documents are split by their names


@dataclasses.dataclass(frozen=True)
class Work:
  """What is done to every entry; it can be pickled.

  Attributes:
    threshold: documents whose score is below it are for validation, in shards that are split by name.
    is_strict: a bad entry ends the build; else it is counted and written to rejects.jsonl.
    quality: judges every document; None keeps them all.
  """

  format: str
  text_field: str
  chat_template: ChatTemplate | None
  threshold: float
  is_strict: bool
  quality: Quality | None = None


class Task(NamedTuple):
  """Some shards, each with the split it belongs to."""

  number: int
  shards: tuple[tuple[str, Shard], ...]

  @property
  def num_bytes(self) -> int:
    return sum(shard.num_bytes for _, shard in self.shards)


def plan_tasks(splits: dict[str, Sequence[Shard]]) -> list[Task]:
  """Returns the tasks of a corpus; shards of splits other than training and validation are left."""
  shards = [(split, shard) for split in (_BY_NAME, *SPLITS) for shard in splits.get(split, ())]
  if SPLITS[1] not in splits:  # validation documents are taken out of the training ones
    shards = [(_BY_NAME, shard) for _, shard in shards]
  total = sum(shard.num_bytes for _, shard in shards)
  limit = min(_TASK_BYTES, max(_TASK_BYTES // _MIN_TASKS, total // _MIN_TASKS))
  tasks: list[list[tuple[str, Shard]]] = []
  size = 0
  for split, shard in shards:
    if not tasks or size + shard.num_bytes > limit:
      tasks.append([])
      size = 0
    tasks[-1].append((split, shard))
    size += shard.num_bytes
  return [Task(number, tuple(shards)) for number, shards in enumerate(tasks)]


def read_documents(work: Work, task: Task) -> Iterator[tuple[str, Kept | Reject]]:
  """Yields the documents of a task, each with its split, and what is left out of it.

  Raises:
    DataError: an entry is bad and the work strict, or a file cannot be read.
  """
  to_document = make_format(work.format, work.text_field, work.chat_template)
  for split, shard in task.shards:
    for entry in shard.read():
      if isinstance(entry, Record):
        try:
          document = to_document(entry)
        except BadRecordError as error:
          entry = Reject(entry.where, str(error), excerpt(str(dict(entry.fields))))
        else:
          yield split or SPLITS[score(document.name) < work.threshold], _judge(work.quality, document)
          continue
      if work.is_strict:
        raise bad_entry(entry)
      yield split, entry


def _judge(quality: Quality | None, document: Document) -> Kept | Reject:
  if quality is None:
    return Kept(document, collections.Counter(), b"")
  verdict = quality(document)
  if verdict.reason:
    return Reject(document.name, verdict.reason, verdict.detail or excerpt(verdict.document.text))
  return Kept(verdict.document, verdict.num_scrubbed, verdict.signature)


def build(
  directory: Path,
  tasks: Sequence[Task],
  work: Work,
  tokenizer_directory: Path,
  num_workers: int,
  progress: Callable[[int], None],
) -> dict[str, Any]:
  """Writes the shards of a store into `directory`, where finished ones are kept, and returns what its manifest says.

  `progress` is told the bytes of every task that is done. Duplicates that are to be left out are found in a pass of
  its own before.
  """
  results = []
  dropped = _find_duplicates(tasks, work, num_workers)
  if work.quality:
    work = dataclasses.replace(work, quality=work.quality.without_signatures())
  calls = [(directory, task, work, names, tokenizer_directory) for task, names in zip(tasks, dropped, strict=True)]
  for task, result in zip(tasks, _run(_build_task, calls, num_workers), strict=True):
    progress(task.num_bytes)
    results.append(result)
  threshold = _threshold_for_both(directory, tasks, results, work.threshold)
  if threshold == work.threshold:
    return _merged(directory, results, tokenizer_directory)
  for number in range(len(tasks)):
    (directory / f"{number:05}.json").unlink()
  work = dataclasses.replace(work, threshold=threshold)
  return build(directory, tasks, work, tokenizer_directory, num_workers, progress)


def _find_duplicates(tasks: Sequence[Task], work: Work, num_workers: int) -> list[dict[str, str]]:
  """Returns, for each task, {name of a document: name of the one that is kept in its stead}."""
  similarity = work.quality.options.duplicate_similarity if work.quality else 0
  if not similarity:
    return [{} for _ in tasks]
  signed = list(_run(_sign_task, [(task, work) for task in tasks], num_workers))
  names = [name for part in signed for name, _ in part]
  standing_for = clusters(names, [signature for part in signed for _, signature in part], similarity)
  dropped, start = [], 0
  for part in signed:
    kept = standing_for[start : start + len(part)].tolist()
    dropped.append({names[start + i]: names[k] for i, k in enumerate(kept) if k != start + i})
    start += len(part)
  return dropped


def _sign_task(task: Task, work: Work) -> list[tuple[str, bytes]]:
  kept = (entry for _, entry in read_documents(work, task) if isinstance(entry, Kept))
  return [(entry.document.name, entry.signature) for entry in kept]


def _threshold_for_both(
  directory: Path, tasks: Sequence[Task], results: Sequence[dict[str, Any]], given: float
) -> float:
  """Returns the threshold that gives each split at least one of two or more documents that are split by name."""
  numbers = [sum(result["documents"][split] for result in results) for split in SPLITS]
  if (
    all(numbers)
    or sum(numbers) < 2
    or not given
    or any(split != _BY_NAME for task in tasks for split, _ in task.shards)
  ):
    return given
  full = SPLITS[numbers[0] == 0]
  files = [directory / f"{task.number:05}.{full}.npy" for task in tasks]
  scores = np.concatenate([np.load(file, allow_pickle=False)["score"] for file in files])
  return float(np.nextafter(scores.min(), 1)) if full == SPLITS[0] else float(scores.max())


def _run(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], num_workers: int) -> Iterator[Any]:
  """Yields what each call returns, in order; by this process where there is one worker or one call."""
  if min(num_workers, len(calls)) <= 1:
    yield from itertools.starmap(function, calls)
    return
  context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
  pool = concurrent.futures.ProcessPoolExecutor(min(num_workers, len(calls)), context, _start_worker)
  try:
    yield from (future.result() for future in [pool.submit(function, *call) for call in calls])
  except concurrent.futures.process.BrokenProcessPool as error:
    raise DataError(
      "a process that prepares data was killed, for want of memory perhaps; lower data.workers"
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
  end_with_parent()
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the tokenizers library; there is a process for each core
  SentencePieceTokenizer.num_threads = 1


def _build_task(
  directory: Path, task: Task, work: Work, dropped: dict[str, str], tokenizer_directory: Path
) -> dict[str, Any]:
  """Returns the counts of a task, after its files are there."""
  finished = directory / f"{task.number:05}.json"
  if finished.exists():
    return json.loads(finished.read_text())
  tokenizer = load_tokenizer(tokenizer_directory)
  writer = ShardWriter(directory, task.number, tokenizer, work.is_strict)
  try:
    for split, entry in read_documents(work, task):
      if isinstance(entry, Reject):
        writer.reject(entry)
      elif entry.document.name in dropped:
        writer.reject(Reject(entry.document.name, "duplicate", dropped[entry.document.name]))
      else:
        writer.add(split, entry)
    counts = writer.finish()
  finally:
    writer.close()
  temporary = finished.with_suffix(".temporary")
  temporary.write_text(json.dumps(counts))
  os.replace(temporary, finished)
  return counts


def _merged(directory: Path, results: Sequence[dict[str, Any]], tokenizer_directory: Path) -> dict[str, Any]:
  """Returns the counts of all tasks together; their rejects become one file."""
  tokenizer = load_tokenizer(tokenizer_directory)
  numbers = range(len(results))
  indices = {
    split: [np.load(directory / f"{number:05}.{split}.npy", allow_pickle=False) for number in numbers]
    for split in SPLITS
  }
  num_sequences = sorted({number for result in results for number in result["num_sequences"]})
  if len(num_sequences) > 1:
    raise DataError("preferences and documents of one text are mixed; give each a source of its own")
  with open(directory / "rejects.jsonl", "wb") as file:
    for number in numbers:
      file.write((directory / f"{number:05}.rejects.jsonl").read_bytes())
  counted = lambda name: dict(
    sorted(sum((collections.Counter(result[name]) for result in results), collections.Counter()).items())
  )
  total = lambda name: {split: sum(result[name][split] for result in results) for split in SPLITS}
  return {
    "tokenizer_fingerprint": tokenizer.fingerprint,
    "fingerprint": {
      split: fingerprint(np.concatenate([np.empty(0, INDEX), *parts]), tokenizer.fingerprint)
      for split, parts in indices.items()
    },
    "documents": total("documents"),
    "tokens": total("tokens"),
    "text_bytes": total("text_bytes"),
    "gzip_bytes": sum(result["gzip_bytes"] for result in results),
    "left_out": counted("left_out"),
    "scrubbed": counted("scrubbed"),
    "num_sequences": num_sequences[0] if num_sequences else 1,
    "shards": len(results),
    "dtype": tokens_dtype(tokenizer.vocab_size),
  }


def sample_texts(work: Work, tasks: Sequence[Task], limit_bytes: int) -> tuple[list[str], int]:
  """Returns training texts for a tokenizer, about `limit_bytes` of UTF-8, and the number of documents that were read.

  They are taken evenly from all tasks and come in the order of their scores, so that which come first is a matter of
  chance. Where every document is held out, as can be where there are few, they are those.
  """
  share = 4 * limit_bytes // max(1, len(tasks))
  work = dataclasses.replace(work, is_strict=False)
  sampled: dict[str, list[tuple[float, str]]] = {split: [] for split in SPLITS}
  for task in tasks:
    size = 0
    for split, entry in read_documents(work, task):
      if isinstance(entry, Reject):
        continue
      text = entry.document.text
      sampled[split].append((score(entry.document.name), text))
      size += len(text.encode())
      if size >= share:
        break
  texts, size = [], 0
  for _, text in sorted(sampled[SPLITS[0]] or sampled[SPLITS[1]]):
    if size >= limit_bytes:
      break
    texts.append(text)
    size += len(text.encode())
  return texts, sum(map(len, sampled.values()))
