"""Writes samples as JSONL, one file per split, and counts them."""

import collections
import hashlib
import heapq
import json
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.data.code.fim import draw
from ultrathink_jax.data.code.languages import language_name
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.code.samples import Draft
from ultrathink_jax.data.code.splits import SPLITS

_KEY_BYTES = 12  # of a hash of what must be there once; a million samples collide with a chance of 1 in 10**17


class _Counts(NamedTuple):
  samples: collections.Counter[tuple[str, str, str]]
  tokens: collections.Counter[tuple[str, str, str]]


class Writer:
  """Files in a folder that are open while the writer is; `left_out` counts what was not written, by reason."""

  def __init__(self, folder: Path, options: CodeOptions):
    self._folder = folder
    self._options = options
    self._files = {split: open(folder / f"{split}.jsonl", "wb") for split in SPLITS}  # noqa: SIM115, closed below
    self._keys: set[bytes] = set()
    self._lowest: dict[str, list[float]] = {kind: [] for kind in options.max_per_kind}  # heaps of negated scores
    self._counts = _Counts(collections.Counter(), collections.Counter())
    self.left_out: collections.Counter[str] = collections.Counter()
    self.sampled: set[str] = set()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *error: object) -> None:
    for file in self._files.values():
      file.close()

  def write(self, draft: Draft, split: str, name: str, **facts: Any) -> None:
    """Writes a sample of a split whose first file is `name`, unless an item that is the same was written already."""
    if draft.key:
      key = hashlib.sha256(f"{draft.kind}\0{draft.key}".encode()).digest()[:_KEY_BYTES]
      if key in self._keys:
        self.left_out[f"{draft.kind}: duplicate"] += 1
        return
      self._keys.add(key)
    text = "".join(draft.fields[field] for field in ("text", "prompt", "completion") if field in draft.fields)
    meta = {
      "kind": draft.kind,
      "path": name,
      "language": language_name(name),
      "span": list(draft.span),
      "name": draft.name,
      "item": draft.item,
      "split": split,
      "tokens": draft.tokens,
      "sha256": hashlib.sha256(text.encode()).hexdigest(),
      **facts,
    }
    self._files[split].write(_line({**draft.fields, "meta": meta}))
    self._count(meta, 1)
    self.sampled.update(facts.get("paths", ()), (name,))
    if draft.kind in self._lowest:
      _push(self._lowest[draft.kind], -self._score(meta), self._options.max_per_kind[draft.kind])

  def finish(self) -> dict[str, Any]:
    """Closes the files and leaves at most so many samples of a kind in them as the options say; returns the counts."""
    self.__exit__()
    limits = self._options.max_per_kind
    excess = {kind for kind in limits if self._total(kind) > limits[kind]}
    if excess:
      bounds = {kind: -self._lowest[kind][0] if self._lowest[kind] else -1.0 for kind in excess}
      for split in SPLITS:
        self._limit(self._folder / f"{split}.jsonl", bounds)
    return {
      "samples": self._table(1),
      "languages": self._table(2),
      "outputs": {f"{split}.jsonl": _sha256(self._folder / f"{split}.jsonl") for split in SPLITS},
    }

  def _limit(self, path: Path, bounds: dict[str, float]) -> None:
    whole = path.with_suffix(".whole")
    path.rename(whole)
    with open(whole, "rb") as source, open(path, "wb") as target:
      for line in source:
        meta = json.loads(line)["meta"]
        if meta["kind"] in bounds and self._score(meta) > bounds[meta["kind"]]:
          self.left_out[f"{meta['kind']}: above max_per_kind"] += 1
          self._count(meta, -1)
        else:
          target.write(line)
    whole.unlink()

  def _score(self, meta: dict[str, Any]) -> float:
    return draw(self._options.seed, "limit", meta["kind"], meta["path"], meta["name"], *meta["span"])

  def _count(self, meta: dict[str, Any], sign: int) -> None:
    key = (meta["split"], meta["kind"], meta["language"])
    self._counts.samples[key] += sign
    self._counts.tokens[key] += sign * meta["tokens"]

  def _total(self, kind: str) -> int:
    return sum(count for (_, each, _), count in self._counts.samples.items() if each == kind)

  def _table(self, column: int) -> dict[str, dict[str, dict[str, int]]]:
    """Returns {split: {kind or language: {samples, tokens}}}."""
    table: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for key in sorted(self._counts.samples):
      if self._counts.samples[key]:
        cell = table[key[0]].setdefault(key[column], {"samples": 0, "tokens": 0})
        cell["samples"] += self._counts.samples[key]
        cell["tokens"] += self._counts.tokens[key]
    return table


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
  """Writes objects one to a line and returns the hash of the file."""
  with open(path, "wb") as file:
    file.writelines(map(_line, rows))
  return _sha256(path)


def _line(row: dict[str, Any]) -> bytes:
  return json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _push(heap: list[float], value: float, size: int) -> None:
  """Keeps the `size` greatest values."""
  if len(heap) < size:
    heapq.heappush(heap, value)
  elif size:
    heapq.heappushpop(heap, value)


def _sha256(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
