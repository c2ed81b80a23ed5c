"""The formats of entries: how the fields of a record become a document.

    text               {text}                         every token is learned
    prompt_completion  {prompt, completion}           strings or lists of messages; the prompt is not learned
    messages           {messages: [{role, content}]}  what the assistant says is learned
    preference         {prompt?, chosen, rejected}    strings or lists of messages; two sequences
    label              {prompt, completion, label}    label: whether the completion is a good one
    auto               the first of preference, label, messages, prompt_completion and text whose fields are there

The names are TRL's. Others are read as these: `conversations` as messages; `question` and `answer`, `instruction` and
`output` or `response`, with an `input` after a blank line, as a question and its answer. Those are a conversation:
without a chat template the question ends with a blank line; with one they become a turn of each. A prompt and a
completion that are strings are put together as they are. A preference without a prompt has the common beginning of
chosen and rejected as its prompt.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ultrathink_jax.data.chat import ChatTemplate
from ultrathink_jax.data.conversations import (
  check_messages,
  check_text,
  is_messages,
  require_answer,
  require_question,
)
from ultrathink_jax.data.documents import BadRecordError, Document, Part, Record
from ultrathink_jax.data.wording import kind_of, names_of, quote
from ultrathink_jax.errors import ConfigError

Fields = Mapping[str, Any]
Sequences = tuple[tuple[Part, ...], ...]

_MESSAGES = ("messages", "conversations")
_QUESTIONS = ("question", "instruction")
_ANSWERS = ("answer", "output", "response")


class Settings(NamedTuple):
  """What a format needs beside the fields."""

  text_field: str
  chat_template: ChatTemplate | None


def text(fields: Fields, settings: Settings) -> Sequences:
  """Returns a text that is learned."""
  return ((Part(check_text(settings.text_field, _field(fields, settings.text_field))),),)


def prompt_completion(fields: Fields, settings: Settings) -> Sequences:
  """Returns a prompt and the completion that is learned."""
  if "prompt" not in fields and "completion" not in fields:
    question_and_answer = _question_and_answer(fields)
    if question_and_answer is not None:
      return (_answered(*question_and_answer, settings),)
  return (_continued(_prompt(fields), "completion", _field(fields, "completion"), settings),)


def messages(fields: Fields, settings: Settings) -> Sequences:
  """Returns a conversation of which the assistant's turns are learned."""
  name = next((name for name in _MESSAGES if name in fields), _MESSAGES[0])
  checked = check_messages(name, _field(fields, name))
  require_answer(name, checked)
  return (_render(checked, 0, settings, fields.get("tools")),)


def preference(fields: Fields, settings: Settings) -> Sequences:
  """Returns the chosen and the rejected sequence."""
  chosen, rejected = _field(fields, "chosen"), _field(fields, "rejected")
  for name, answer in (("chosen", chosen), ("rejected", rejected)):
    if not answer:
      raise BadRecordError(f"{name} is empty" if isinstance(answer, (str, list)) else f"{name} is {kind_of(answer)}")
  if is_messages(chosen) != is_messages(rejected):
    raise BadRecordError(f"chosen is {kind_of(chosen)}, but rejected is {kind_of(rejected)}")
  if chosen == rejected:
    raise BadRecordError("chosen and rejected are equal")
  if is_messages(chosen):
    prompt, chosen, rejected = _split_conversations(fields, chosen, rejected)
  elif "prompt" in fields:
    prompt = _prompt(fields)
  else:
    prompt, chosen, rejected = _split_texts(check_text("chosen", chosen), check_text("rejected", rejected))
  return (
    _continued(prompt, "chosen", chosen, settings),
    _continued(prompt, "rejected", rejected, settings),
  )


def _label(fields: Fields) -> bool:
  label = _field(fields, "label")
  if not isinstance(label, bool):
    raise BadRecordError(f"label is {kind_of(label)}, not true or false")
  return label


def auto(fields: Fields, settings: Settings) -> Sequences:
  """Returns what the format does whose fields are there."""
  return FORMATS[_detect(fields, settings)](fields, settings)


FORMATS: dict[str, Callable[[Fields, Settings], Sequences]] = {
  "auto": auto,
  "text": text,
  "prompt_completion": prompt_completion,
  "messages": messages,
  "preference": preference,
  "label": prompt_completion,
}


def make_format(name: str, text_field: str, chat_template: ChatTemplate | None) -> Callable[[Record], Document]:
  """Returns a function from records to documents, which raises BadRecordError.

  Raises:
    ConfigError: there is no such format.
  """
  if name not in FORMATS:
    near = difflib.get_close_matches(name, FORMATS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"data.format={name!r} is not one of {', '.join(FORMATS)}{hint}")
  if name == "messages" and chat_template is None:
    raise ConfigError("data.format='messages' needs a chat template; set data.chat_template to plain or chatml")
  settings = Settings(text_field, chat_template)

  def to_document(record: Record) -> Document:
    kind = _detect(record.fields, settings) if name == "auto" else name
    sequences = FORMATS[kind](record.fields, settings)
    return Document(record.where, sequences, _label(record.fields) if kind == "label" else None)

  return to_document


def _detect(fields: Fields, settings: Settings) -> str:
  """Returns the format whose fields are there. Raises BadRecordError."""
  if "chosen" in fields and "rejected" in fields:
    return "preference"
  if "completion" in fields and "label" in fields:
    return "label"
  if any(name in fields for name in _MESSAGES):
    return "messages"
  if ("prompt" in fields and "completion" in fields) or _question_and_answer(fields) is not None:
    return "prompt_completion"
  if settings.text_field in fields:
    return "text"
  known = f"{quote(settings.text_field, 16)}, messages, prompt and completion, ..."
  raise BadRecordError(f"has {'the fields ' if fields else ''}{names_of(fields)}; expected {known}")


def _field(fields: Fields, name: str) -> Any:
  if name in fields:
    return fields[name]
  near = difflib.get_close_matches(name, [key for key in fields if isinstance(key, str)], 1, 0.5)
  hint = f"did you mean {quote(near[0], 16)}?" if near else f"it has {names_of(fields)}"
  raise BadRecordError(f"lacks {quote(name)}; {hint}")


def _prompt(fields: Fields) -> Any:
  prompt = _field(fields, "prompt")
  return prompt if is_messages(prompt) else check_text("prompt", prompt)


def _question_and_answer(fields: Fields) -> tuple[Any, Any] | None:
  """Returns the question and the answer, if there are such fields."""
  question = next((name for name in _QUESTIONS if name in fields), None)
  if question is not None and isinstance(fields.get("instances"), list):  # of self-instruct's seed tasks
    instances = fields["instances"]
    if len(instances) != 1 or not isinstance(instances[0], Mapping):
      raise BadRecordError(f"has {len(instances)} instances; one is expected")
    fields = {question: fields[question], **instances[0]}
  answer = next((name for name in _ANSWERS if name in fields), None)
  if question is None or answer is None:
    return None
  words = check_text(question, fields[question])
  if question == "instruction" and fields.get("input"):
    words = f"{words}\n\n{check_text('input', fields['input'])}"
  return words, check_text(answer, fields[answer])


def _answered(question: str, answer: str, settings: Settings) -> tuple[Part, ...]:
  if settings.chat_template is None:
    return (Part(f"{question}\n\n", False), Part(answer))
  turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
  return _render(turns, 0, settings, None)


def _continued(prompt: Any, name: str, answer: Any, settings: Settings) -> tuple[Part, ...]:
  """Returns a prompt and its answer: two texts, or two lists of messages."""
  if is_messages(prompt) != is_messages(answer):
    raise BadRecordError(f"prompt is {kind_of(prompt)}, but {name} is {kind_of(answer)}")
  if not is_messages(answer):
    parts = (Part(prompt, False), Part(check_text(name, answer)))
    return parts if prompt else parts[1:]
  context = check_messages("prompt", prompt)
  require_question("prompt", context)
  reply = check_messages(name, answer, before=context[-1]["role"])
  require_answer(name, reply)
  return _render(context + reply, len(context), settings, None)


def _render(turns: list[dict[str, Any]], num_context: int, settings: Settings, tools: Any) -> tuple[Part, ...]:
  if settings.chat_template is None:
    raise BadRecordError("holds messages, which need a chat template; set data.chat_template to plain or chatml")
  try:
    return settings.chat_template.render(turns, num_context, tools)
  except BadRecordError as error:
    raise BadRecordError(f"chat template {error}") from error


def _split_conversations(fields: Fields, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
  """Returns the prompt and the two answers of conversations, which may begin with the prompt."""
  role = chosen[0].get("role", chosen[0].get("from")) if isinstance(chosen[0], Mapping) else None
  if role in ("assistant", "gpt") and "prompt" in fields:
    prompt = _prompt(fields)
    return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), chosen, rejected
  length = 0
  while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
    length += 1
  if not 0 < length < min(len(chosen), len(rejected)):
    raise BadRecordError("chosen and rejected begin with no prompt in common" if not length else "one answer is empty")
  return chosen[:length], chosen[length:], rejected[length:]


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Returns the common beginning of two texts, up to the white space before they differ, and the rest of each."""
  pairs = zip(chosen, rejected, strict=False)
  length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
  cut = max(chosen.rfind(mark, 0, length) for mark in " \n\t")
  cut = max(cut, 0)
  return chosen[:cut], chosen[cut:], rejected[cut:]
