"""From a source tree to one JSONL file of samples per split, with a manifest that accounts for every file."""

import collections
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ultrathink_jax.data.code.assembling import Assembler
from ultrathink_jax.data.code.commits import head_commit
from ultrathink_jax.data.code.drafting import Report, plan_jobs, run_jobs
from ultrathink_jax.data.code.languages import LANGUAGES, language_name
from ultrathink_jax.data.code.licences import folder_licences, is_allowed, licence_of
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.code.output import Writer, write_lines
from ultrathink_jax.data.code.scan import LeftOut, scan
from ultrathink_jax.data.code.splits import SPLITS, Assignment, assign, find_modules
from ultrathink_jax.data.code.tokens import EstimatedTokens, TokenizerView
from ultrathink_jax.data.storage import read_manifest, write_directory
from ultrathink_jax.errors import ConfigError, DataError

_VERSION = 1  # raise when the same tree gives other samples
_PACKAGES = ("tree-sitter", *sorted({language.grammar[0].replace("_", "-") for language in LANGUAGES.values()}))
_SUFFIXES = ("", ".incomplete", ".outdated")  # of the folders that writing the output goes through


def build_code_data(
  root: Path,
  output: Path,
  options: CodeOptions,
  tokenizer: TokenizerView | None,
  log: Callable[[str], None],
) -> dict[str, Any]:
  """Returns the manifest of what is written to `output`: train, validation and test.jsonl, files.jsonl, manifest.json.

  The same files, options, tokenizer and grammars give the same bytes, on any machine. Without a tokenizer tokens are
  estimated as four bytes each. The output exists as a whole or not at all, and takes the place of an earlier one.

  Raises:
    ConfigError: `output` is something else than an earlier output.
    DataError: the root is no folder, or nothing in it can be used.
  """
  root, output = root.resolve(), output.resolve()
  _check_output(root, output)
  builder = Builder(root, options, tokenizer, log, [output.with_name(output.name + suffix) for suffix in _SUFFIXES])
  key = hashlib.sha256(json.dumps(builder.recipe(), sort_keys=True).encode()).hexdigest()
  return write_directory(output, key, builder.write)


def _check_output(root: Path, output: Path) -> None:
  if root.is_relative_to(output):
    raise ConfigError(f"output {output} holds the source tree {root}; choose another folder, which is written anew")
  if output.is_dir() and any(output.iterdir()) and "samples" not in (read_manifest(output) or {}):
    raise ConfigError(f"output {output} holds something else than samples of code; choose another folder")
  if output.exists() and not output.is_dir():
    raise ConfigError(f"output {output} is a file; choose a folder")


class Builder:
  """A build: the files found, and how samples are made of them."""

  def __init__(
    self,
    root: Path,
    options: CodeOptions,
    tokenizer: TokenizerView | None,
    log: Callable[[str], None],
    skipped: Collection[Path],
  ):
    self._root = root
    self._options = options
    self._tokenizer = EstimatedTokens() if tokenizer is None else tokenizer
    self._log = log
    self._found, self._left_out = scan(root, options, skipped)

  def recipe(self) -> dict[str, Any]:
    """Returns what decides the outcome beside the files."""
    return {
      "version": _VERSION,
      "settings": self._options.settings(),
      "tokenizer": self._tokenizer.fingerprint,
      "grammars": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }

  def identity(self) -> str:
    """Returns a hash that differs whenever samples may differ, found without reading files."""
    digest = hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode())
    for found in self._found:
      digest.update(f"{found.name}\0{found.num_bytes}\0{found.mtime_ns}\n".encode())
    digest.update(str(self._options.kinds.get("commit") and head_commit(self._root)).encode())
    return digest.hexdigest()

  def write(self, folder: Path) -> dict[str, Any]:
    """Fills a folder and returns its manifest."""
    spool = folder / "spool"
    spool.mkdir()
    self._log(f"code: reading {len(self._found)} files")
    jobs = plan_jobs(self._root, self._found, spool, self._options, self._tokenizer)
    reports = run_jobs(jobs, self._options, self._log)
    modules = find_modules(self._root, [report.found.path for report in reports])
    reports, licences = self._licensed(reports)
    assigned = self._assign(reports, modules)
    if not any(assignment.split for assignment in assigned.values()):
      raise DataError(f"code:{self._root} gives no samples: {self._complaint(reports)}")
    used = {report.found.name: report for report in reports if assigned[report.found.name].split}
    assembler = Assembler(
      root=self._root,
      reports=used,
      splits={name: assigned[name].split for name in used},
      modules={report.found.name: module for report, module in zip(reports, modules, strict=True)},
      options=self._options,
      tokenizer=self._tokenizer,
    )
    with Writer(folder, self._options) as writer:
      assembler.write(jobs, writer)
      written = writer.finish()
    shutil.rmtree(spool)
    files = _file_rows(reports, self._left_out, assigned, licences, writer.sampled)
    written["outputs"]["files.jsonl"] = write_lines(folder / "files.jsonl", files)
    manifest = {
      **self.recipe(),
      **written,
      **_file_counts(files),
      **_report_counts(used.values()),
      "git_commit": head_commit(self._root),
      "samples_left_out": dict(assembler.left_out + writer.left_out + _sum(used.values(), "left_out")),
    }
    self._log(_summary(manifest))
    return json.loads(json.dumps(manifest, sort_keys=True))

  def _licensed(self, reports: Sequence[Report]) -> tuple[list[Report], dict[str, str]]:
    """Returns the reports without those of files whose licence is not wanted, and the licence of each file."""
    folders = folder_licences(self._root, [report.found.path for report in reports])
    licences = {r.found.name: r.licence or licence_of(r.found.path, folders) for r in reports}
    allowed = set(self._options.licences)
    checked = []
    for report in reports:
      if not report.reason and allowed and not is_allowed(licences[report.found.name], allowed):
        report = Report(report.found, "licence")
      checked.append(report)
    return checked, licences

  def _assign(self, reports: Sequence[Report], modules: Sequence[str]) -> dict[str, Assignment]:
    """Returns what becomes of each file by name."""
    usable = [i for i, report in enumerate(reports) if not report.reason]
    names = [reports[i].found.name for i in usable]
    assigned = assign(names, [reports[i].signature for i in usable], [modules[i] for i in usable], self._options)
    refused = {r.found.name: Assignment("", r.reason, "") for r in reports if r.reason}
    return refused | dict(zip(names, assigned, strict=True))

  def _complaint(self, reports: Sequence[Report]) -> str:
    counts = collections.Counter(report.reason for report in reports if report.reason)
    for left_out in self._left_out:
      counts[left_out.reason] += left_out.num_files
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(5))
    return f"{counts.total()} files found ({reasons}); check the path and the options" if counts else "it has no files"


def _file_rows(
  reports: Sequence[Report],
  left_out: Sequence[LeftOut],
  assigned: dict[str, Assignment],
  licences: dict[str, str],
  sampled: Collection[str],
) -> list[dict[str, Any]]:
  """Returns what became of every file, sorted by name; a folder that was not entered is one row."""
  rows = [{"path": each.name, "files": each.num_files, "reason": each.reason} for each in left_out]
  for report in reports:
    name = report.found.name
    assignment = assigned[name]
    reason = assignment.reason or ("" if name in sampled else "no sample kept")
    row = {"path": name, "files": 1, "language": language_name(name), "bytes": report.found.num_bytes}
    row |= {"licence": licences[name], "sha256": report.sha256} if report.sha256 else {}
    row |= {"reason": reason} if reason else {"split": assignment.split, "has_errors": report.has_errors}
    row |= {"cluster": assignment.cluster} if assignment.cluster not in ("", name) else {}
    rows.append(row)
  return sorted(rows, key=lambda row: row["path"])


def _file_counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  left_out: collections.Counter[str] = collections.Counter()
  for row in rows:
    if "reason" in row:
      left_out[row["reason"]] += row["files"]
  used = [row for row in rows if "reason" not in row]
  return {
    "files": {"found": sum(row["files"] for row in rows), "used": len(used), "left_out": dict(left_out)},
    "files_by_split": {split: sum(row["split"] == split for row in used) for split in SPLITS},
    "files_by_language": dict(collections.Counter(row["language"] for row in used)),
    "files_with_errors": sum(row["has_errors"] for row in used),
    "licences": dict(collections.Counter(row["licence"] for row in used)),
  }


def _report_counts(reports: Collection[Report]) -> dict[str, Any]:
  items: dict[str, collections.Counter[str]] = {}
  for report in reports:
    if report.num_items:
      items.setdefault(language_name(report.found.name), collections.Counter()).update(report.num_items)
  return {
    "items": {language: dict(counts) for language, counts in items.items()},
    "secrets": dict(_sum(reports, "secrets")),
  }


def _sum(reports: Collection[Report], field: str) -> collections.Counter[str]:
  total: collections.Counter[str] = collections.Counter()
  for report in reports:
    total.update(getattr(report, field))
  return total


def _summary(manifest: dict[str, Any]) -> str:
  files = manifest["files"]
  samples = {split: sum(c["samples"] for c in kinds.values()) for split, kinds in manifest["samples"].items()}
  counts = ", ".join(f"{count} {split}" for split, count in samples.items())
  reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(files["left_out"].items()))
  return f"code: {files['used']} of {files['found']} files give {counts} samples; left out: {reasons or 'none'}"
