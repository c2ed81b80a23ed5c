"""The text of a source file, cleaned, or the reason why it is not one to learn from."""

import collections
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.data.code.licences import declared_licence
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.code.scan import Found
from ultrathink_jax.data.quality.secrets import scrub

_MARKER_LINES = 10
_LICENCE_LINES = 30
_GENERATED = re.compile(
  r"@generated\b|\bdo not (?:edit|modify)\b|\b(?:auto|automatically|machine)[ -]?generated\b|\bcode generated\b"
  r"|\bgenerated (?:by|from|with)\b.{0,40}\b(?:bindgen|cbindgen|protoc|prost|tonic|flatc|thrift|openapi|swagger)\b",
  re.IGNORECASE,
)


class SourceFile(NamedTuple):
  """A file as it is learned.

  Attributes:
    content: UTF-8 without byte order mark, lines ended by a line feed, secrets replaced; spans count its bytes.
    sha256: of the file as it lies on disk.
    licence: what the file itself declares, "" if nothing.
    secrets: how many were replaced, by their sort.
  """

  content: bytes
  sha256: str
  licence: str
  secrets: collections.Counter[str]


def read_source(root: Path, found: Found, options: CodeOptions) -> SourceFile | str:
  """Returns a file, or the reason to leave it out, from what is in it alone."""
  try:
    with open(root / found.path, "rb") as file:
      raw = file.read(options.max_file_bytes + 1)
  except OSError:
    return "unreadable"
  if len(raw) > options.max_file_bytes:
    return "too large"
  if b"\0" in raw:
    return "binary"
  try:
    text = raw.decode("utf-8-sig")
  except UnicodeDecodeError:
    return "not UTF-8"
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  secrets: collections.Counter[str] = collections.Counter()
  reason = _content_reason(text, options)
  if not reason and options.secrets != "keep":
    scrubbed, secrets = scrub(text)
    reason = "secrets" if secrets and options.secrets == "drop" else None
    text = scrubbed
  if reason:
    return reason
  licence = declared_licence(_first_lines(text, _LICENCE_LINES))
  return SourceFile(text.encode(), hashlib.sha256(raw).hexdigest(), licence, secrets)


def _content_reason(text: str, options: CodeOptions) -> str | None:
  stripped = text.strip()
  if not stripped:
    return "empty"
  if _GENERATED.search(_first_lines(text, _MARKER_LINES)):
    return "generated"
  lines = stripped.split("\n")
  if max(map(len, lines)) > options.max_line_chars:
    return "too long line"
  if len(stripped) / len(lines) > options.max_mean_line_chars:
    return "too long lines on average"
  visible = "".join(stripped.split())
  if sum(map(str.isalnum, visible)) < options.min_alphanumeric * len(visible):
    return "low alphanumeric ratio"
  return None


def _first_lines(text: str, count: int) -> str:
  return "\n".join(text.split("\n", count)[:count])
