"""What training data is like, for a terminal or a log."""

import io
import os
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ultrathink_jax.data.token_store import SPLITS
from ultrathink_jax.report.page import short

_BAR_WIDTH = 40
_MAX_RUN_CHARS = 400
_MAX_SEGMENTS = 6


class Marks(NamedTuple):
  """What stands before and after a text that is not learned, and what is about the text rather than in it."""

  unlearned: tuple[str, str]
  edge: tuple[str, str]


PLAIN = Marks(("⟦", "⟧"), ("", ""))
ASCII = Marks(("[[", "]]"), ("", ""))
COLORS = Marks(("\x1b[38;5;208m", "\x1b[0m"), ("\x1b[36m", "\x1b[0m"))


def marks_for(stream: io.TextIOBase) -> Marks:
  """Returns colours for a terminal that shows them, and else signs. NO_COLOR turns colours off."""
  if stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
    return COLORS
  return PLAIN if "".join(PLAIN.unlearned).encode(stream.encoding, "ignore") else ASCII


def format_inspection(facts: dict[str, Any], marks: Marks) -> str:
  """Returns data.json as text: whether the data is healthy, how much there is and how often it is read, then more."""
  parts = [headline(facts), *map(_table, source_tables(facts)), _histogram(facts), _packings(facts)]
  return "\n\n".join([*parts, *_samples(facts["samples"], marks)])


def headline(facts: dict[str, Any]) -> str:
  """Returns what a person wants to know first."""
  train, validation, run = facts["splits"]["train"], facts["splits"]["validation"], facts["run"]
  found = [f"look at   {visible(finding)}" for finding in facts["findings"]] or ["healthy   nothing looks wrong"]
  passes = f"{run['epochs']:.2f} times all there is"
  if len(facts["sources"]) > 1:
    passes += f", {run['passes']:.2f} times the source that it reads most often"
  lines = [
    *found,
    f"training  {train['tokens']:,} tokens in {train['documents']:,} documents, {_binary(train['text_bytes'])} of text",
    f"held out  {validation['tokens']:,} tokens in {validation['documents']:,} documents",
    f"the run   {run['steps']:,} steps of {run['batch_size']:,} x {run['sequence_length']:,} = "
    f"{run['rows'] * run['sequence_length']:,} positions: {passes}",
  ]
  return "\n".join(lines)


def source_tables(facts: dict[str, Any]) -> list[list[tuple[str, ...]]]:
  """Returns the table of the sources, and that of what stands out in them; the first row is the head."""
  sources = [("source", "split", "documents", "tokens", "bytes/token", "learned", "weight", "run reads", "epochs")]
  changes = [("source", "", "", "why")]
  for number, source in enumerate(facts["sources"]):
    name, weights = visible(source["source"]), (f"{stage['shares'][number]:.0%}" for stage in facts["stages"])
    use = (f"{source['learned']:.0%}", " → ".join(weights), short(source["tokens"]), f"{source['epochs']:.2f}")
    for split, first, rest in zip(SPLITS, (name, ""), (use, ("",) * len(use)), strict=True):
      counts = source["splits"][split]
      ratio = "-" if counts["bytes_per_token"] is None else f"{counts['bytes_per_token']:.2f}"
      sources.append((first, split, f"{counts['documents']:,}", f"{counts['tokens']:,}", ratio, *rest))
    for kind in ("left_out", "scrubbed"):
      for why, count in sorted(source[kind].items(), key=lambda item: -item[1]):
        changes.append((name, kind.replace("_", " "), f"{count:,}", visible(why)))
    if source["good"] is not None:
      changes.append((name, "labelled", f"{source['good']:.0%}", "good"))
    if source["left_out"]:
      changes.append((name, "listed in", "", source["rejects"]))
  return [sources, changes] if len(changes) > 1 else [sources]


def histogram_rows(facts: dict[str, Any]) -> list[tuple[str, int, int]]:
  """Returns (range of tokens, documents, tokens) of the bins between the shortest and the longest document."""
  lengths = facts["lengths"]
  ranges = [f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}" for low, high in pairwise(lengths["edges"])]
  rows = list(zip(ranges, lengths["documents"], lengths["tokens"], strict=True))
  filled = [number for number, row in enumerate(rows) if row[1]]
  return rows[filled[0] : filled[-1] + 1]


def length_note(facts: dict[str, Any]) -> str:
  """Returns percentiles and the share of the documents that are longer than a row."""
  lengths, row = facts["lengths"], facts["run"]["sequence_length"]
  fit = f"{lengths['longer']:.1%} do not fit" if lengths["longer"] else "all fit"
  return (
    f"mean {lengths['mean']:,.0f}, median {lengths['p50']:,}; 5% have up to {lengths['p5']:,}, 95% up to "
    f"{lengths['p95']:,}, 99% up to {lengths['p99']:,}, the longest {lengths['max']:,} tokens; "
    f"{fit} into a row of {row:,}"
  )


def packing_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
  """Returns the table of the packings; the first row is the head."""
  rows = [("packing", "rows an epoch", "filled", "documents cut", "")]
  is_staged = len(facts["packings"]) > 1
  for stage in facts["packings"]:
    for name in ("split", "best_fit"):
      packed = stage[name]
      chosen = "this run's" if name == facts["run"]["packing"] else ""
      when = f", from step {stage['first_step']:,} on in pieces of {stage['limit']:,}" if is_staged else ""
      cells = (f"{packed['rows']:,}", f"{packed['efficiency']:.2%}", f"{packed['cut']:.1%}", chosen)
      rows.append((name + when, *cells))
  return rows


def visible(text: str) -> str:
  """Returns a text in which control characters, and those of other direction, are spelled out; lines stay lines."""
  is_plain = lambda c: c in "\n\t" or unicodedata.category(c)[0] != "C"
  return "".join(c if is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, limit: int) -> str:
  """Returns the beginning and the end of a text that is longer than `limit`."""
  if len(text) <= limit + 50:
    return text
  left_out = len(text) - limit
  return f"{text[: 2 * limit // 3]} [... {left_out:,} characters ...] {text[2 * limit // 3 + left_out :]}"


def _histogram(facts: dict[str, Any]) -> str:
  rows = histogram_rows(facts)
  documents, tokens = sum(row[1] for row in rows), max(1, sum(row[2] for row in rows))
  largest = max(row[1] for row in rows)
  lines = [
    (name, f"{count:,}", f"{count / documents:.1%}", f"{size / tokens:.1%}", "█" * round(_BAR_WIDTH * count / largest))
    for name, count, size in rows
  ]
  head = ("length in tokens", "documents", "share", "of all tokens", "")
  return f"{_table([head, *lines])}\n{length_note(facts)}"


def _packings(facts: dict[str, Any]) -> str:
  return _table(packing_rows(facts))


def _samples(samples: Sequence[dict[str, Any]], marks: Marks) -> list[str]:
  begin, cut, end = (_edge(name, marks) for name in ("[begins]", "[cut]", "[end]"))
  unlearned = _mark("what is not learned", False, marks)
  legend = f"samples   {unlearned}; {begin} and {end} of a document, {cut} where it goes on elsewhere"
  return [legend, *(_format_sample(sample, marks) for sample in samples)]


def _format_sample(sample: dict[str, Any], marks: Marks) -> str:
  segments = sample["segments"]
  title = (
    f"{visible(sample['title'])}: {sample['learned']:,} tokens learned, {sample['unlearned']:,} not, "
    f"{sample['padding']:,} padding; {len(segments):,} piece{'s'[: len(segments) != 1]}"
  )
  lines = [_edge(f"--- {title}", marks)]
  for segment in segments[:_MAX_SEGMENTS]:
    texts = [_mark(shorten(visible(run["text"]), _MAX_RUN_CHARS), run["is_learned"], marks) for run in segment["runs"]]
    begin = _edge("[begins]" if segment["begins"] else "[cut]", marks)
    end = _edge("[cut]" if segment["end"] is None else "[end]", marks)
    if segment["end"] is False:
      end = _mark("[end]", False, marks)
    lines.append(f"{begin}{''.join(texts)}{end}")
  if len(segments) > _MAX_SEGMENTS:
    lines.append(_edge(f"... and {len(segments) - _MAX_SEGMENTS:,} more", marks))
  return "\n".join(lines)


def _mark(text: str, is_learned: bool, marks: Marks) -> str:
  return text if is_learned else f"{marks.unlearned[0]}{text}{marks.unlearned[1]}"


def _edge(text: str, marks: Marks) -> str:
  return f"{marks.edge[0]}{text}{marks.edge[1]}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
  """Returns rows, the first of them the head, as columns; those of numbers end together."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  is_number = [all(not cell or cell[0] in "-0123456789" for cell in cells) for cells in zip(*rows[1:], strict=True)]
  columns = list(zip(widths, is_number, strict=True))
  lines = [
    [cell.rjust(width) if ends else cell.ljust(width) for cell, (width, ends) in zip(row, columns, strict=True)]
    for row in rows
  ]
  return "\n".join("  ".join(line).rstrip() for line in lines)


def _binary(num_bytes: int | float) -> str:
  units = iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
  unit = next(units)
  while num_bytes >= 1024 and unit != "TiB":
    num_bytes, unit = num_bytes / 1024, next(units)
  return f"{num_bytes:,} bytes" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
