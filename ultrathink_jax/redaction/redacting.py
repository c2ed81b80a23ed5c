"""`redact` for whatever is written down: texts, command lines, environments, nested configurations."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ultrathink_jax.redaction.forms import SECRETS
from ultrathink_jax.redaction.names import Secrecy, is_secret, secrecy

REDACTED = "<redacted>"

_LEAST_LENGTH = 6  # of the value of an environment variable that is looked for everywhere

# Tokens by their forms; shorter ones than are issued today too.
_FORMS = [form.pattern for form in SECRETS if form.name not in ("assigned_secret", "password", "url_password")]
_FORMS.append(
  re.compile(
    r"(?<![A-Za-z0-9])(?P<secret>hf_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|sk-(?=[\w-]*[0-9])[\w-]{16,}|glpat-[\w-]{16,}|wandb_v[0-9]+_\w{16,}|eyJ[\w-]{4,}\.eyJ[\w-]{4,}\.[\w-]+)",
    re.ASCII,
  )
)
_FORMS.append(re.compile(r"\b(?:Bearer|Basic)\s{1,4}(?P<secret>(?=\S*[0-9=])[\w.~+/=-]{12,})", re.ASCII))
_FORMS.append(re.compile(r"://(?P<secret>[^\s/@]{0,200}:[^\s/]{0,500}|(?=[^\s/@]{0,500}[0-9])[\w.~%+-]{16,500})@"))
_FORMS.append(re.compile(r"[?&](?:[\w-]*[-_])?(?:sig|signature|credential)=(?P<secret>[^&\s\"']+)", re.I))

_HINT = re.compile(r"pass|pwd|secret|token|key|credential|cookie|authorization", re.I)
_NAME = r"(?P<name>[A-Za-z_][\w.-]{2,100})"
_ASSIGNMENTS = (
  # one quoted argument of a command line
  re.compile(rf"""(?P<quote>["'])-{{1,2}}{_NAME}=(?P<value>.*?)(?P=quote)""", re.S),
  re.compile(
    rf"""(?<![\w.-])-{{0,2}}{_NAME}\\*["']?\]?\s{{0,4}}(?:=>|:=|[:=])\s{{0,4}}"""
    r"""(?:\\*(?P<quote>["'`])(?P<quoted>.*?)\\*(?P=quote)"""
    r"""|(?:(?:Bearer|Basic|Token)\s{1,4})?(?P<value>[^\s"'`&]+?)(?=[,;)\]}]*(?:[\s"'`&]|$)))""",
    re.S,
  ),
  re.compile(rf"""(?<![\w.-])-{{1,2}}{_NAME}\s{{1,4}}(?P<value>[^\s-]\S*)"""),
)


def redact(value: Any) -> Any:
  """Returns `value`, a text or mappings and sequences of what JSON knows, with REDACTED in place of all secrets.

  Secret is what a name says is (password, api_key, HF_TOKEN; not num_tokens or cls_token), what looks like a token, the
  part of a URL before @, and the value of each environment variable whose name says so, wherever it appears. Doing it
  twice changes nothing more, so that redacted values can be compared.
  """
  return _redact(value, _environment_values())


def _environment_values() -> tuple[str, ...]:
  """Returns the values of variables with secret names, the longest first."""
  values = {
    value
    for name, value in os.environ.items()
    if _HINT.search(name) and len(value) >= _LEAST_LENGTH and not value.isdecimal() and is_secret(name.upper(), value)
  }
  return tuple(sorted(values - {REDACTED}, key=lambda value: (-len(value), value)))


def _redact(value: Any, known: tuple[str, ...]) -> Any:
  if isinstance(value, str):
    return _redact_text(value, known)
  if isinstance(value, Mapping):
    return {_redact(name, known): _redact_named(name, item, known) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    before = (None, *value)
    items = [REDACTED if _is_value_of(before[i], item) else _redact(item, known) for i, item in enumerate(value)]
    return _like(value, items)
  return value


def _redact_named(name: Any, value: Any, known: tuple[str, ...]) -> Any:
  """Returns a value of a mapping; if its name is that of a secret, so is all that is in it."""
  if not isinstance(name, str) or isinstance(value, bool):
    return _redact(value, known)
  if isinstance(value, str):
    return REDACTED if is_secret(name, value) else _redact(value, known)
  said = secrecy(name)
  if isinstance(value, (Mapping, list, tuple)):
    is_hidden = said in (Secrecy.CERTAIN, Secrecy.TOKEN) or name.lower().endswith("secrets")
  else:
    is_hidden = said is Secrecy.CERTAIN
  return _hide(value) if is_hidden else _redact(value, known)


def _hide(value: Any) -> Any:
  """Returns `value` with REDACTED for every text and number in it."""
  if isinstance(value, Mapping):
    return {name: _hide(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return _like(value, [_hide(item) for item in value])
  return REDACTED if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "" else value


def _like(sequence: Any, items: list[Any]) -> Any:
  if isinstance(sequence, list):
    return items
  return type(sequence)(*items) if hasattr(sequence, "_fields") else tuple(items)


def _is_value_of(flag: Any, value: Any) -> bool:
  """Returns whether `value` follows the name of a secret on a command line."""
  if not (isinstance(flag, str) and isinstance(value, str)) or not re.fullmatch(r"-{1,2}[\w.-]+", flag):
    return False
  return not value.startswith("--") and is_secret(flag.lstrip("-"), value)


def _redact_text(text: str, known: tuple[str, ...]) -> str:
  for secret in known:
    text = text.replace(secret, REDACTED)
  for pattern in _FORMS:
    text = pattern.sub(_replace_form, text)
  argument = re.fullmatch(rf"-{{1,2}}{_NAME}=(.+)", text, re.S)
  if argument and is_secret(argument["name"], argument[2]):
    return text[: argument.start(2)] + REDACTED
  if _HINT.search(text):
    for pattern in _ASSIGNMENTS:
      text = pattern.sub(_replace_assigned, text)
  return text


def _replace_form(match: re.Match[str]) -> str:
  return _put(match, "secret")


def _replace_assigned(match: re.Match[str]) -> str:
  group = "quoted" if match.groupdict().get("quoted") is not None else "value"
  return _put(match, group) if is_secret(match["name"], match[group] or "") else match[0]


def _put(match: re.Match[str], group: str) -> str:
  start, stop = match.span(group)
  return match.string[match.start() : start] + REDACTED + match.string[stop : match.end()]
