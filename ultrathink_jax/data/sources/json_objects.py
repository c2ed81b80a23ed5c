"""JSON read strictly: what may mean two things, or nothing, is refused rather than guessed.

NaN and Infinity are no JSON. An object with the same key twice is refused, because readers disagree on which value
counts. A value that would take a great deal of memory or stack is refused before it does.
"""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from ultrathink_jax.data.documents import BadRecordError
from ultrathink_jax.data.wording import kind_of, quote

_LARGE_BYTES = 8 * 1024 * 1024
_MAX_VALUES = 2_000_000  # in a large line; each takes up to 200 bytes once it is read


def _refuse_constant(name: str) -> NoReturn:
  raise BadRecordError(f"holds {name}, which is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) != len(pairs):
    keys = [key for key, _ in pairs]
    raise BadRecordError(f"has the key {quote(next(key for key in keys if keys.count(key) > 1))} twice")
  return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def parse_object(content: bytes) -> dict[str, Any]:
  """Returns the one object that `content` holds. Raises BadRecordError."""
  if len(content) > _LARGE_BYTES and sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
    raise BadRecordError(f"holds more than {_MAX_VALUES:,} values")
  try:
    value = _DECODER.decode(content.decode())
  except UnicodeDecodeError as error:
    wrong = f"is not UTF-8: byte 0x{content[error.start]:02x} at position {error.start}"
    raise BadRecordError(wrong) from error
  except (ValueError, RecursionError) as error:
    raise BadRecordError(reason(error)) from error
  return require_object(value)


def require_object(value: Any) -> dict[str, Any]:
  """Returns a value that is an object. Raises BadRecordError for others."""
  if not isinstance(value, dict):
    raise BadRecordError(f"is {kind_of(value)}, not an object with named fields")
  return value


def reason(error: ValueError | RecursionError) -> str:
  """Returns why something is not JSON, as one line."""
  if isinstance(error, BadRecordError):
    return str(error)
  if isinstance(error, RecursionError):
    return "is nested too deeply"
  if isinstance(error, json.JSONDecodeError):
    return f"is not JSON: {error.msg} at character {error.pos + 1}"
  return "holds a number of too many digits"


def parse_list(texts: Iterator[str], max_chars: int) -> Iterator[Any]:
  """Yields the items of a JSON list one by one, from its text in pieces; holds no more than an item at a time.

  Raises:
    BadRecordError: an item is not JSON or longer than `max_chars`, or the list does not end; where one item ends and
      the next begins cannot be told after that.
  """
  text = _Text(texts)
  text.skip("[")
  mark = "" if text.peek() == "]" else ","
  while mark == ",":
    yield _item(text, max_chars)
    mark = text.skip(",]")
  if mark != "]":
    text.skip("]")
  if text.peek():
    raise BadRecordError("goes on after the end of its list")


class _Text:
  """The part of a text that is not consumed yet, and has been asked for."""

  def __init__(self, texts: Iterator[str]):
    self._texts = texts
    self.text, self.index = "", 0

  def extend(self) -> bool:
    """Appends at least as much as there is, so that reading an item again and again stays linear."""
    parts = [self.text[self.index :]]
    wanted = max(1, len(parts[0]))
    while wanted > 0 and (part := next(self._texts, "")):
      parts.append(part)
      wanted -= len(part)
    self.text, self.index = "".join(parts), 0
    return len(parts) > 1

  def peek(self) -> str:
    """Returns the next character that is not white space, "" at the end."""
    while True:
      while self.index < len(self.text):
        if self.text[self.index] not in " \t\r\n":
          return self.text[self.index]
        self.index += 1
      if not self.extend():
        return ""

  def skip(self, marks: str) -> str:
    found = self.peek()
    if not found or found not in marks:
      raise BadRecordError(f"has {quote(found) if found else 'its end'} where {' or '.join(marks)} belongs")
    self.index += 1
    return found


def _item(text: _Text, max_chars: int) -> Any:
  text.peek()
  while True:
    try:
      value, end = _DECODER.raw_decode(text.text, text.index)
    except json.JSONDecodeError as error:  # perhaps because the rest of the item is not there yet
      wrong = f"is not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:
      raise BadRecordError(reason(error)) from error
    else:
      if end < len(text.text):  # a number at the end may go on
        text.index = end
        return value
      wrong = "ends within its list"
    if len(text.text) - text.index > max_chars:
      raise BadRecordError(f"{wrong}, or holds an item of more than {max_chars:,} characters")
    if not text.extend():
      raise BadRecordError(wrong)
