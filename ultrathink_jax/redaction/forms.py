"""What secrets look like: the published forms of tokens and keys, and values that a name says are secret.

A form finds candidates; whether one `is_real` tells it from hashes, UUIDs, names and what people write in examples.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

SECRET = "<SECRET>"  # the marker of a document

_EXAMPLE = re.compile(r"example|placeholder|changeme|change_me|redacted|your[_-]|x{4}|\*{3}|\.{3}|0{8}|123456789", re.I)
_PLACEHOLDER = re.compile(r"pass|secret|user|token|key|sample|dummy|test|fake|foo|bar|123|none|null|true|false", re.I)
_NUMBER = re.compile(r"[0-9]+")
_LETTER = re.compile(r"[A-Za-z]")
_ALL_WORDS = frozenset(("password", "passwd", "pass", "pwd", "pw", "secret", "token", "user", "username", "key"))


class Kind(NamedTuple):
  """One kind of what is replaced.

  Attributes:
    hint: an RE2 pattern that is in the UTF-8 of every text with a match.
    pattern: what is replaced is its group `secret`; the rest of a match stays.
    is_real: whether what it found is more than something of the same form.
  """

  name: str
  hint: str
  pattern: re.Pattern[str]
  is_real: Callable[[str], bool]
  marker: str = SECRET


def _is_token(value: str) -> bool:
  return len(set(value)) >= 8 and not _EXAMPLE.search(value)


def _is_mixed(value: str) -> bool:
  """Returns whether a token has letters of both cases, and fewer hyphens than what is made of words."""
  return _is_token(value) and value[3:].upper() != value[3:] != value[3:].lower() and value.count("-") * 8 < len(value)


def _is_random(value: str) -> bool:
  """Returns whether a string has digits, letters and 3 bits per character, more than most names, and is no address."""
  if len(value) < 16 or not _is_token(value) or not _LETTER.search(value) or not _NUMBER.search(value):
    return False
  entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
  return entropy >= 3 and "://" not in value and not value.startswith(("/", "./", "~/"))


def _is_random_line(value: str) -> bool:
  """Returns whether a value without quotes is random, where names and calls have a number at most."""
  return _is_random(value) and len(_NUMBER.findall(value)) >= 2


def _is_password(value: str) -> bool:
  if _is_random(value):
    return True
  has_both = bool(_LETTER.search(value) and _NUMBER.search(value))
  return has_both and len(set(value)) >= 4 and not _EXAMPLE.search(value) and not _PLACEHOLDER.search(value)


def _is_url_password(value: str) -> bool:
  return len(set(value)) > 1 and value.lower() not in _ALL_WORDS and not _EXAMPLE.search(value)


def _is_private_key(value: str) -> bool:
  return len(set(value)) >= 20


def _token(name: str, hint: str, pattern: str, is_real: Callable[[str], bool] = _is_token) -> Kind:
  """Returns a kind of token that stands between characters which are no letters or digits."""
  bounded = rf"(?<![A-Za-z0-9])(?P<secret>{pattern})(?![A-Za-z0-9])"
  return Kind(name, hint, re.compile(bounded, re.ASCII), is_real)


_SECRET_NAME = (
  r"(?:secret(?:[_-]?(?:access[_-]?)?key)?|(?:api|access|auth|account|private|encryption|signing)[_-]?key"
  r"|(?:access|auth|api|bearer|refresh|secret|session|bot|oauth)[_-]?token)"
)
_PASSWORD_NAME = r"(?:password|passwd|passphrase)"
_ASSIGN = r"""["'\]]{0,2}(?::[ ]?[\w. |\[\]]{1,24})?[ \t]{0,8}(?:=>|:=|=|:)[ \t]{0,8}"""
_QUOTED_CHARACTER = r"""[^\s"'`<>{}$\\]"""
_LINE_CHARACTER = r"[\w+/=.~!@#%^&*-]"
_QUOTED = _ASSIGN + rf"""[rbuf]?(?P<quote>["'`])(?P<secret>{_QUOTED_CHARACTER}{{6,200}})(?P=quote)"""
_QUOTED_HINT = _ASSIGN + rf"""[rbuf]?["'`]{_QUOTED_CHARACTER}{{6}}"""
_TO_LINE_END = rf"[ \t]{{0,4}}[=:][ \t]{{0,4}}(?P<secret>{_LINE_CHARACTER}{{16,200}}+)[ \t\r]*$"
_TO_LINE_END_HINT = rf"[ \t]{{0,4}}[=:][ \t]{{0,4}}{_LINE_CHARACTER}{{16}}"

SECRETS = (
  Kind(
    "private_key",
    "PRIVATE KEY",
    re.compile(
      r"(?P<secret>-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
      r"(?=(?:(?!-----)[\s\S]){0,400}?[A-Za-z0-9+/]{40})"  # a header alone, as in code that reads keys, stays
      r"(?:(?:(?!-----)[\s\S]){0,20000}-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
      r"|(?:(?:[\s\"',]|\\[nr])*[A-Za-z0-9+/=]{40,})*))"  # cut off
    ),
    _is_private_key,
  ),
  _token("json_web_token", r"eyJ[\w-]{8}", r"eyJ[\w-]{8,4000}\.eyJ[\w-]{8,8000}\.[\w-]{20,2000}"),
  _token("aws_key", "AKIA|ASIA|ABIA|ACCA", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}"),
  _token(
    "github_token",
    "gh[opsur]_[A-Za-z0-9]{8}|github_pat_",
    r"gh[opsur]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
  ),
  _token("gitlab_token", "glpat-", r"glpat-[\w-]{20,64}"),
  _token("huggingface_token", "hf_[A-Za-z0-9]{16}", r"hf_[A-Za-z0-9]{34,40}", _is_mixed),
  _token(
    "model_api_key",
    r"(?:sk-|gsk_|xai-|pplx-|r8_)[\w-]{16}",
    r"sk-[\w-]{32,250}|gsk_[A-Za-z0-9]{52}|xai-[A-Za-z0-9]{80}|pplx-[A-Za-z0-9]{48}|r8_[A-Za-z0-9]{37}",
    _is_mixed,
  ),
  _token("slack_token", "xox[abeoprs]-|xapp-", r"xox[abeoprs]-[A-Za-z0-9-]{10,250}|xapp-\d-[A-Za-z0-9-]{20,250}"),
  _token("google_key", r"AIza|ya29\.|GOCSPX-", r"AIza[\w-]{35}|ya29\.[\w-]{30,1000}|GOCSPX-[\w-]{28}"),
  _token(
    "stripe_key", "[rs]k_(?:live|test)_|whsec_", r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}|whsec_[A-Za-z0-9]{32,64}"
  ),
  _token(
    "service_token",
    r"pypi-AgE|npm_\w{8}|SG\.[\w-]{8}|do[opr]_v1_|shp(?:at|ca|pa|ss)_|dapi[0-9a-f]{8}|dckr_pat_|figd_|lin_api_|ATATT3|sk-or-",
    r"pypi-AgE[\w-]{50,500}|npm_[A-Za-z0-9]{36}|SG\.[\w-]{22}\.[\w-]{43}|do[opr]_v1_[0-9a-f]{64}"
    r"|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}|dapi[0-9a-f]{32}|dckr_pat_[\w-]{27}|figd_[\w-]{40,60}"
    r"|lin_api_[A-Za-z0-9]{40}|ATATT3[\w=-]{100,250}|sk-or-v1-[0-9a-f]{64}",
  ),
  _token("telegram_token", r"\d{8}:AA", r"\d{8,10}:AA[\w-]{33}"),
  Kind(
    "webhook",
    r"hooks\.slack\.com|/api/webhooks/",
    re.compile(
      r"(?:hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/)"
      r"(?P<secret>T[A-Z0-9]{6,16}/B[A-Z0-9]{6,16}/[A-Za-z0-9]{20,40}|\d{15,20}/[\w-]{60,100})"
    ),
    _is_token,
  ),
  Kind(
    "url_password",
    r"://[^\s/:@]*:",
    re.compile(r"""://[^\s/:@<>"'`(){}$]{0,64}:(?P<secret>[^\s/@<>"'`(){}$%][^\s/@<>"'`(){}$]{2,127})@(?=[\w\[])"""),
    _is_url_password,
  ),
  Kind(
    "authorization",
    "(?i)authorization",
    re.compile(
      r"authorization[\"']?\s{0,4}[:=,]\s{0,4}[\"']?(?:Bearer|Basic|Token)\s{1,4}(?P<secret>[\w.~+/=-]{16,2000})",
      re.I | re.ASCII,
    ),
    _is_random,
  ),
  Kind(
    "assigned_secret",
    "(?i)" + _SECRET_NAME + _QUOTED_HINT,
    re.compile(_SECRET_NAME + _QUOTED, re.I | re.ASCII),
    _is_random,
  ),
  Kind(
    "assigned_secret",
    f"(?i)(?:{_SECRET_NAME}|{_PASSWORD_NAME})" + _TO_LINE_END_HINT,
    re.compile(f"(?:{_SECRET_NAME}|{_PASSWORD_NAME})" + _TO_LINE_END, re.I | re.ASCII | re.M),
    _is_random_line,
  ),
  Kind(
    "password",
    "(?i)" + _PASSWORD_NAME + _QUOTED_HINT,
    re.compile(_PASSWORD_NAME + _QUOTED, re.I | re.ASCII),
    _is_password,
  ),
)
