"""What commits changed: their messages and the lines before and after, without anything about who made them."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.data.wording import printable
from ultrathink_jax.errors import DataError

_SECONDS = 30
_TRAILER = re.compile(
  r"^\s*[A-Z][\w-]*-(?:by|By|to|To)\s*:.*$|^\s*(?:Cc|CC|From|Author|Change-Id)\s*:.*$", re.MULTILINE
)
_ADDRESS = re.compile(
  r"(?:[\w.'\"-]+ ){0,4}<[^<>\s]+@[^<>\s]+>|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
)  # with the name before it
_HANDLE = re.compile(r"(?<![\w/@.`])@[A-Za-z0-9][\w-]*")
# Whatever the user's configuration says, the output is the same and runs no other programs.
_SETTINGS = (
  "core.quotePath=false", "diff.noprefix=false", "diff.mnemonicPrefix=false", "diff.algorithm=myers",
  "diff.suppressBlankEmpty=false", "diff.interHunkContext=0", "diff.indentHeuristic=true", "diff.submodule=short",
  "diff.ignoreSubmodules=all", "log.showSignature=false", "i18n.logOutputEncoding=utf-8", "core.fsmonitor=false",
)  # fmt: skip
_LOG = (
  "log", "--no-merges", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--no-notes", "--no-mailmap",
  "--no-decorate", "--relative", "--unified=3", "--src-prefix=a/", "--dst-prefix=b/", "-O/dev/null",
  "--format=%x00%H%x00%B%x00", "--patch",
)  # fmt: skip


class Hunk(NamedTuple):
  """Lines that follow one another in a file, before and after a commit."""

  name: str
  before: str
  after: str


class Commit(NamedTuple):
  """A commit; `message` without the trailers, addresses and handles that name people."""

  sha: str
  message: str
  hunks: tuple[Hunk, ...]


def head_commit(root: Path) -> str | None:
  """Returns the commit that is checked out, or None if it does not have the folder, or there is no repository."""
  try:
    result = _run(root, "rev-parse", "HEAD", "HEAD:./")
  except (OSError, subprocess.SubprocessError):
    return None
  return result.stdout.decode().split()[0] if result.returncode == 0 else None


def read_commits(root: Path, max_commits: int) -> Iterator[Commit]:
  """Yields the latest commits, newest first, one at a time.

  Raises:
    DataError: git fails.
  """
  command = _command(root, *_LOG, f"--max-count={max_commits}", "HEAD", "--", ".")
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as log:
    try:
      yield from _parse(_records(log.stdout))
    finally:
      log.stdout.close()
      if log.poll() is None:
        log.wait(_SECONDS)
  if log.returncode:
    raise DataError(f"git log failed with status {log.returncode} in code:{root}; leave commit out of kinds")


def without_people(message: str) -> str:
  """Returns a commit message without trailers, addresses and handles."""
  message = _HANDLE.sub("", _ADDRESS.sub("", _TRAILER.sub("", message)))
  return re.sub(r"\n{3,}", "\n\n", message).strip()


def _command(root: Path, *arguments: str) -> list[str]:
  settings = [part for setting in _SETTINGS for part in ("-c", setting)]
  return ["git", "--no-pager", "-C", str(root), *settings, *arguments]


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    _command(root, *arguments), capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False
  )


def _records(stream) -> Iterator[tuple[str, str, str]]:
  """Yields sha, message and patch of each commit from the output of git."""
  buffer, parts = b"", []
  while block := stream.read(1 << 20):
    *complete, buffer = (buffer + block).split(b"\0")
    parts += complete
    while len(parts) > 4:  # "", sha, message, patch of one and the sha of the next
      yield tuple(part.decode("utf-8", "replace") for part in parts[1:4])
      del parts[:3]
  parts.append(buffer)
  if len(parts) >= 4:
    yield tuple(part.decode("utf-8", "replace") for part in parts[1:4])


def _parse(records: Iterator[tuple[str, str, str]]) -> Iterator[Commit]:
  for sha, message, patch in records:
    hunks = tuple(_hunks(patch))
    if hunks:
      yield Commit(sha, without_people(message), hunks)


def _hunks(patch: str) -> Iterator[Hunk]:
  """Yields the hunks of files that there are after the commit."""
  name, before, after, left = "", [], [], [0, 0]
  for line in patch.split("\n"):
    if any(left):
      mark, text = line[:1], line[1:]
      if mark in ("-", " ", ""):
        before.append(text)
        left[0] -= 1
      if mark in ("+", " ", ""):
        after.append(text)
        left[1] -= 1
      if not any(left) and name:
        yield Hunk(name, "\n".join([*before, ""]), "\n".join([*after, ""]))
    elif line.startswith("+++ "):
      path = line[4:].removesuffix("\t")
      name = printable(path.removeprefix("b/")) if path.startswith("b/") else ""
    elif match := re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
      left = [int(group) if group is not None else 1 for group in match.groups()]
      before, after = [], []
