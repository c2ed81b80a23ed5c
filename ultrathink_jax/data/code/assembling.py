"""Brings the drafts of files, tests of functions, packages and commits together, each in its split."""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ultrathink_jax.data.code.commits import Commit, read_commits
from ultrathink_jax.data.code.drafting import Job, Report, read_drafts
from ultrathink_jax.data.code.fim import draw
from ultrathink_jax.data.code.items import Span
from ultrathink_jax.data.code.languages import comment_format
from ultrathink_jax.data.code.linking import Function, link
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.code.output import Writer
from ultrathink_jax.data.code.pieces import Pieces
from ultrathink_jax.data.code.reading import read_source
from ultrathink_jax.data.code.repository import Member, dependency_order, pack
from ultrathink_jax.data.code.samples import Draft, Place, Sampler, header
from ultrathink_jax.data.code.splits import SPLITS
from ultrathink_jax.data.code.tokens import TokenizerView, find_file_separator
from ultrathink_jax.data.quality.secrets import scrub
from ultrathink_jax.errors import DataError

_CACHED_FILES = 64
_SEPARATION_TOKENS = 2  # what stands before and after a file


class Assembler:
  """Writes the samples of all files whose split is known.

  Args:
    reports: of the files that are used, by name.
    splits, modules: of these files.
  """

  def __init__(
    self,
    root: Path,
    reports: Mapping[str, Report],
    splits: Mapping[str, str],
    modules: Mapping[str, str],
    options: CodeOptions,
    tokenizer: TokenizerView,
  ):
    self._root = root
    self._reports = reports
    self._splits = splits
    self._modules = modules
    self._options = options
    self._sampler = Sampler(options, tokenizer)
    self._separator = find_file_separator(tokenizer.has_token)
    self._functions = self._index_functions()
    self._content = functools.lru_cache(_CACHED_FILES)(self._read)
    self.left_out: collections.Counter[str] = collections.Counter()

  def write(self, jobs: Sequence[Job], writer: Writer) -> None:
    """Writes every sample; those of a file follow the order of files by name."""
    for job in jobs:
      for found, drafts in zip(job.files, read_drafts(job), strict=True):
        if found.name in self._splits:
          self._write_file(found.name, drafts, writer)
    if self._options.kinds.get("repo"):
      self._write_packages(writer)
    if self._options.kinds.get("commit"):
      for commit in read_commits(self._root, self._options.max_commits):
        self._write_commit(commit, writer)

  def _write_file(self, name: str, drafts: Sequence[Draft], writer: Writer) -> None:
    pairs = [*((draft, None) for draft in drafts), *self._tests(name)]
    for draft, paths in self._limited(name, pairs):
      writer.write(draft, self._splits[name], name, **({"paths": paths} if paths else {}))

  def _limited(self, name: str, pairs: list[tuple[Draft, list[str] | None]]) -> list[tuple[Draft, list[str] | None]]:
    limit = self._options.max_per_file
    if limit is None or len(pairs) <= limit:
      return pairs
    self.left_out["above max_per_file"] += len(pairs) - limit
    scores = [draw(self._options.seed, "file", draft.kind, name, *draft.span) for draft, _ in pairs]
    kept = sorted(range(len(pairs)), key=scores.__getitem__)[:limit]
    return [pairs[i] for i in sorted(kept)]

  def _read(self, name: str) -> bytes:
    source = read_source(self._root, self._reports[name].found, self._options)
    if isinstance(source, str) or source.sha256 != self._reports[name].sha256:
      raise DataError(f"{name} changed while samples were made of it; run again when nothing writes to the tree")
    return source.content

  def _text(self, name: str, span: Span) -> str:
    return self._content(name)[span[0] : span[1]].decode()

  def _index_functions(self) -> dict[str, dict[str, list[Function]]]:
    """Returns the functions of each split by their simple names."""
    index: dict[str, dict[str, list[Function]]] = {split: {} for split in SPLITS}
    for name, split in self._splits.items():
      for place in self._reports[name].functions:
        index[split].setdefault(place.simple_name, []).append(Function(name, place))
    return index

  def _tests(self, name: str) -> Iterator[tuple[Draft, list[str]]]:
    """Yields the tests in a file, each after the function it tests, and the files of both."""
    if not self._options.kinds.get("test"):
      return
    for test in self._reports[name].tests:
      text = self._text(name, test.span)
      function = link(test, name, text, self._functions[self._splits[name]])
      if function is None:
        self.left_out["test: no function of its name in its split"] += 1
      elif not self._sampler.is_kept("test", name, *test.span):
        self.left_out["test: not in the share kept"] += 1
      else:
        draft = self._test(name, test, text, function)
        if self._sampler.fits(draft, self.left_out):
          yield draft, sorted({name, function.file})

  def _test(self, name: str, test: Place, text: str, function: Function) -> Draft:
    place = function.place
    code = self._text(function.file, place.span)
    cue = comment_format(name).format(f"test of {place.name}:")
    prompt = f"{place.header}{code}\n\n{test.header}{cue}\n"
    return self._sampler.make(
      "test", {"prompt": prompt, "completion": text + "\n"}, test.span, name=test.name, item=test.item
    )

  def _write_packages(self, writer: Writer) -> None:
    """Writes the files of each package and split, those that others need first."""
    groups: dict[tuple[str, str], list[Member]] = {}
    for name, split in self._splits.items():
      report = self._reports[name]
      member = Member(name, report.imports, report.tokens + _SEPARATION_TOKENS)
      groups.setdefault((self._modules[name], split), []).append(member)
    for (module, split), members in sorted(groups.items()):
      for run in pack(dependency_order(members), self._options.repo_tokens - 1):
        names = [member.name for member in run]
        if not self._sampler.is_kept("repo", *names):
          self.left_out["repo: not in the share kept"] += 1
          continue
        texts = [self._file(name) for name in names]
        draft = self._sampler.make("repo", {"text": "\n".join(texts)}, (0, len(texts[0].encode())), name=module)
        if self._sampler.fits(draft, self.left_out):
          writer.write(draft, split, names[0], paths=names)

  def _file(self, name: str) -> str:
    """Returns a file of a package, after its separator and path."""
    content = self._content(name)
    text = Pieces(content, self._reports[name].cuts).text(0, len(content))
    return f"{self._separator}{name}\n{text}" if self._separator else header(name) + text

  def _write_commit(self, commit: Commit, writer: Writer) -> None:
    """Writes the hunks of a commit in files of one split together, whole ones, as many as there is room for."""
    if not self._sampler.is_kept("commit", commit.sha):
      self.left_out["commit: not in the share kept"] += 1
      return
    message = self._scrubbed(commit.message)
    for split in SPLITS:
      text, paths = f"commit: {message}\n", []
      for hunk in commit.hunks:
        if self._splits.get(hunk.name) != split:
          continue
        change = self._scrubbed(f"\npath: {hunk.name}\nbefore:\n{hunk.before}after:\n{hunk.after}")
        if self._sampler.count_tokens(text + change) <= self._options.max_tokens:
          text, paths = text + change, [*paths, hunk.name]
        else:
          self.left_out["commit: too many tokens for a change"] += 1
      if paths:
        draft = self._sampler.make("commit", {"text": text}, (0, 0), name=commit.sha)
        if self._sampler.fits(draft, self.left_out):
          writer.write(draft, split, paths[0], paths=sorted(set(paths)))

  def _scrubbed(self, text: str) -> str:
    return text if self._options.secrets == "keep" else scrub(text, with_contacts=True)[0]
