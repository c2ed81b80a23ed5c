"""Chat templates: from messages to the text a model sees, and which of it the model learns.

Templates are Jinja, as tokenizers of the Hugging Face Hub carry them. What the assistant says is learned, with the mark
that ends its turn, and nothing else. A template that puts {% generation %} around the assistant's turns says itself
what that is; of others it is found by rendering the conversation up to each turn, which works only if a template does
not change the beginning of a conversation for what comes after.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ultrathink_jax.data.documents import BadRecordError, Part
from ultrathink_jax.data.template_sandbox import GENERATION_START, GENERATION_STOP, compile_template, render
from ultrathink_jax.data.wording import in_short, printable
from ultrathink_jax.errors import ConfigError

_MAX_SOURCE_CHARS = 1_000_000
_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_STOP}]")
_MAX_REASON_CHARS = 100

Message = Mapping[str, Any]

BUILT_IN = {
  "chatml": """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
  "plain": """\
{%- for message in messages %}
{{- '### ' + message['role'] | capitalize + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '\\n\\n' }}{% endgeneration %}
{%- else %}
{{- message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant\\n' }}{% endif %}""",
}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template that is known to work; `name` is what messages call it.

  Raises:
    ConfigError: the source is not Jinja, or does what no template may.
  """

  name: str
  source: str
  bos_token: str = ""
  eos_token: str = ""

  def __post_init__(self) -> None:
    try:
      if len(self.source) > _MAX_SOURCE_CHARS:
        raise BadRecordError(f"has more than {_MAX_SOURCE_CHARS:,} characters")
      _compile(self.source)
    except (BadRecordError, jinja2.TemplateError, RecursionError, SyntaxError) as error:
      raise self._wrong(f"cannot be read: {_words(error)}") from error
    question, answer = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}
    try:
      self.render([question, answer, question, answer])
    except BadRecordError as error:
      raise self._wrong(f"does not work for two questions and answers: it {error}") from error

  def render(
    self, messages: Sequence[Message], num_context: int = 0, tools: Sequence[Any] | None = None
  ) -> tuple[Part, ...]:
    """Returns a conversation as it is learned; of the first `num_context` messages nothing is.

    Raises:
      BadRecordError: the template refuses the conversation, or it cannot be told what the assistant says.
    """
    marked = self._text(messages, False, tools)
    has_marks = _MARKS.search(marked) is not None
    parts = list(_marked_parts(marked) if has_marks else self._grown_parts(messages, marked, tools))
    if num_context:
      parts = _after(self.prompt(messages[:num_context], tools), parts)
    parts = _merged(parts)
    if not any(part.is_learned for part in parts):
      raise BadRecordError("leaves nothing to be learned of a conversation")
    return tuple(parts)

  def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
    """Returns a conversation up to where the assistant speaks. Raises BadRecordError."""
    return _MARKS.sub("", self._text(messages, True, tools))

  def _grown_parts(self, messages: Sequence[Message], text: str, tools: Sequence[Any] | None) -> Iterator[Part]:
    """Yields the parts by what each turn of the assistant adds to the conversation before."""
    position = 0
    for index, message in enumerate(messages):
      if message["role"] == "assistant":
        before = self.prompt(messages[:index], tools) if index else ""
        after = self._text(messages[: index + 1], False, tools)
        if not (text.startswith(after) and after.startswith(before) and len(before) >= position):
          raise BadRecordError("changes earlier turns for later ones; put {% generation %} around the assistant's")
        yield Part(text[position : len(before)], False)
        yield Part(after[len(before) :], True)
        position = len(after)
    yield Part(text[position:], False)

  def _text(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None) -> str:
    variables = {
      "messages": messages,
      "tools": tools,
      "documents": None,
      "add_generation_prompt": add_generation_prompt,
      "bos_token": self.bos_token,
      "eos_token": self.eos_token,
    }
    try:
      return render(_compile(self.source), variables)
    except Exception as error:  # a template may fail as any program may
      raise BadRecordError(f"cannot be rendered: {_words(error)}") from error

  def _wrong(self, what: str) -> ConfigError:
    return ConfigError(f"chat template {printable(self.name)!r} {what}; choose another one, or {', '.join(BUILT_IN)}")


def find_chat_template(name: str, tokenizer: str = "") -> ChatTemplate | None:
  """Returns the template that `data.chat_template` names.

  It is `none`, a built-in one, the path of a Jinja file or of a folder with a tokenizer, or `auto`: the one that came
  with the tokenizer at the path `tokenizer`, else `plain`.
  """
  if name == "none":
    return None
  if name in BUILT_IN:
    return ChatTemplate(name, BUILT_IN[name])
  if name == "auto":
    folder = Path(tokenizer).expanduser()
    found = _beside_tokenizer(folder if folder.is_dir() else folder.parent) if tokenizer and folder.exists() else None
    return found or ChatTemplate("plain", BUILT_IN["plain"])
  path = Path(name).expanduser()
  if path.is_dir():
    found = _beside_tokenizer(path)
    if found is None:
      raise ConfigError(f"data.chat_template={name!r} is a folder without chat_template.jinja; name a Jinja file")
    return found
  if path.is_file():
    return ChatTemplate(name, _read(path), **_special_tokens(_settings(path.parent)))
  choices = ("auto", "none", *BUILT_IN)
  near = difflib.get_close_matches(name, choices, 1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  raise ConfigError(f"data.chat_template={name!r} is not one of {', '.join(choices)} or a Jinja file{hint}")


def _beside_tokenizer(folder: Path) -> ChatTemplate | None:
  settings = _settings(folder)
  file = folder / "chat_template.jinja"
  source = _read(file) if file.is_file() else settings.get("chat_template")
  if isinstance(source, list):  # several by name
    source = next((item["template"] for item in source if item.get("name") == "default"), None)
  return ChatTemplate(str(folder), source, **_special_tokens(settings)) if isinstance(source, str) else None


def _settings(folder: Path) -> dict[str, Any]:
  file = folder / "tokenizer_config.json"
  try:
    settings = json.loads(_read(file)) if file.is_file() else {}
  except ValueError as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"{printable(str(file))} is not JSON: {in_short(error)}; write it anew") from error
  return settings if isinstance(settings, dict) else {}


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
  tokens = {name: settings.get(name) for name in ("bos_token", "eos_token")}
  contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
  return {name: token for name, token in contents.items() if isinstance(token, str)}


def _read(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{printable(str(path))} cannot be read: {in_short(error)}; make it a readable text") from error


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
  return compile_template(source)


def _words(error: BaseException) -> str:
  return "it is nested too deeply" if isinstance(error, RecursionError) else in_short(error, _MAX_REASON_CHARS)


def _marked_parts(text: str) -> Iterator[Part]:
  """Yields the parts of a text in which the assistant's turns are marked."""
  is_learned = False
  position = 0
  for mark in _MARKS.finditer(text):
    if is_learned is (mark.group() == GENERATION_START):
      raise BadRecordError("puts one {% generation %} into another")
    yield Part(text[position : mark.start()], is_learned)
    position, is_learned = mark.end(), not is_learned
  yield Part(text[position:], is_learned)


def _after(context: str, parts: Sequence[Part]) -> list[Part]:
  """Returns parts that begin with the text `context`, of which nothing is learned."""
  rest = "".join(part.text for part in parts)
  if not rest.startswith(context):
    raise BadRecordError("changes a prompt for what follows it, so that the two cannot be told apart")
  left, result = len(context), []
  for part in parts:
    result += [Part(part.text[:left], False), Part(part.text[left:], part.is_learned)]
    left = max(0, left - len(part.text))
  return result


def _merged(parts: Sequence[Part]) -> list[Part]:
  """Returns the same text in as few parts as possible."""
  merged: list[Part] = []
  for part in parts:
    if part.text and merged and merged[-1].is_learned == part.is_learned:
      merged[-1] = Part(merged[-1].text + part.text, part.is_learned)
    elif part.text:
      merged.append(part)
  return merged
