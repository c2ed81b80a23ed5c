"""Lists of messages as data sets hold them, checked and brought into one form.

A message has a role and a content; ShareGPT's `from` and `value` are read as these, with its names for the roles. A
content that is a list of texts is joined. An optional system message comes first; then the user begins, the assistant
answers, and so on; results of tools stand between two messages of the assistant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ultrathink_jax.data.documents import BadRecordError
from ultrathink_jax.data.template_sandbox import GENERATION_START, GENERATION_STOP
from ultrathink_jax.data.wording import kind_of, names_of, quote

_ROLES = {
  "system": "system",
  "developer": "developer",
  "user": "user",
  "human": "user",
  "assistant": "assistant",
  "gpt": "assistant",
  "bot": "assistant",
  "model": "assistant",
  "tool": "tool",
  "function": "tool",
  "function_response": "tool",
  "observation": "tool",
}
_FOLLOWERS = {
  "": {"system", "developer", "user"},
  "system": {"user"},
  "developer": {"user"},
  "user": {"assistant"},
  "assistant": {"user", "tool"},
  "tool": {"tool", "assistant"},
}
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")


def check_text(name: str, text: Any, may_be_empty: bool = False) -> str:
  """Returns a text that can be tokenized. Raises BadRecordError."""
  if not isinstance(text, str):
    raise BadRecordError(f"{name} is {kind_of(text)}, not a string")
  if not text and not may_be_empty:
    raise BadRecordError(f"{name} is empty")
  if "\0" in text:
    raise BadRecordError(f"{name} holds a NUL character at position {text.index(chr(0))}")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise BadRecordError(f"{name} holds half a character (a lone surrogate) at position {error.start}") from error
  return text


def check_messages(name: str, messages: Any, before: str = "") -> list[dict[str, Any]]:
  """Returns messages as {role, content}, in an order that makes sense after a message of the role `before`.

  Raises:
    BadRecordError: they are none.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
    raise BadRecordError(f"{name} is {kind_of(messages)}, not a list of messages")
  if not messages:
    raise BadRecordError(f"{name} is an empty list")
  checked = []
  for index, message in enumerate(messages):
    checked.append(_message(f"{name}[{index}]", message))
    role = checked[-1]["role"]
    if role not in _FOLLOWERS[before]:
      place = f"after {before!r}" if before else "at the start"
      raise BadRecordError(f"{name}[{index}] has the role {role!r} {place}; there belongs {_choice(before)}")
    before = role
  return checked


def require_answer(name: str, messages: Sequence[Mapping[str, Any]]) -> None:
  """Checks that the assistant has the last word. Raises BadRecordError."""
  if messages[-1]["role"] != "assistant":
    raise BadRecordError(f"{name} ends with the role {messages[-1]['role']!r}; the assistant has the last word")


def require_question(name: str, messages: Sequence[Mapping[str, Any]]) -> None:
  """Checks that the assistant comes next. Raises BadRecordError."""
  if messages[-1]["role"] not in ("user", "tool"):
    raise BadRecordError(f"{name} ends with the role {messages[-1]['role']!r}; the user or a tool has its last word")


def is_messages(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _message(name: str, message: Any) -> dict[str, Any]:
  if not isinstance(message, Mapping):
    raise BadRecordError(f"{name} is {kind_of(message)}, not an object with role and content")
  keys = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
  calls = message.get("tool_calls")
  if keys[0] not in message or (keys[1] not in message and not calls):
    missing = next(key for key in keys if key not in message)
    raise BadRecordError(f"{name} lacks {missing!r}; it has {names_of(message)}")
  role = message[keys[0]]
  if not isinstance(role, str) or role not in _ROLES:
    known = "system, user, assistant or tool"
    raise BadRecordError(f"{name} has the role {quote(role)}; it is {known}")
  role = _ROLES[role]
  content = message.get(keys[1])
  if content is None and calls:
    content = ""
  content = check_text(f"{name}.{keys[1]}", _joined(content), bool(calls) or role in ("tool", "system"))
  if GENERATION_START in content or GENERATION_STOP in content:
    raise BadRecordError(f"{name} holds a character that is reserved for programs (U+FDD0 or U+FDD1)")
  return {"role": role, "content": content, **{key: message[key] for key in _KEPT if message.get(key) is not None}}


def _joined(content: Any) -> Any:
  """Returns a content of several texts as one."""
  if not isinstance(content, list) or not content:
    return content
  if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
    other = next(part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)))
    kind = other.get("type") if isinstance(other, Mapping) else kind_of(other)
    raise BadRecordError(f"a message holds {quote(kind)} beside text, which is not supported")
  return "".join(part["text"] for part in content)


def _choice(before: str) -> str:
  return " or ".join(sorted(_FOLLOWERS[before]))
