"""Which names say that their value is secret: api_key and HF_TOKEN do, num_tokens and cls_token do not."""

import enum
import re

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

_SECRETS = re.compile(
  r"password|passwd|passphrase|pwd|secret|apikey|secretkey|accesskey|credential|credentials|authorization|cookie"
)
_KEY_OWNERS = re.compile(
  r"api|access|secret|private|auth|account|encryption|signing|ssh|master|service|subscription|license|licence"
)
_TOKEN_OWNERS = re.compile(
  r"access|api|app|auth|bearer|bot|csrf|deploy|github|gitlab|hf|hub|hugging|huggingface|jwt|login|mlflow|npm"
  r"|oauth|personal|pypi|refresh|secret|security|service|session|slack|wandb"
)
# Whose token is one of a vocabulary.
_VOCABULARY = re.compile(
  r"added|additional|audio|begin|bos|box|cls|code|decoder|end|eod|eos|eot|eom|fim|first|forced|image|im|last"
  r"|mask|max|middle|min|new|next|null|pad|padding|per|prefix|sep|special|start|stop|str|suffix|text|think|tool"
  r"|unk|video|vision|word"
)
_DIRECTORIES = ("PWD", "OLDPWD")  # in the environment of every shell


class Secrecy(enum.Enum):
  """What a name says of its value."""

  NONE = enum.auto()
  MAYBE = enum.auto()  # it is a token, of whatever kind
  CERTAIN = enum.auto()
  TOKEN = enum.auto()  # certain, unless it is a number


def secrecy(name: str) -> Secrecy:
  """Returns what the last part of a dotted name says."""
  words = [word.lower() for word in _WORD.findall(name.rsplit(".", 1)[-1])]
  if not words:
    return Secrecy.NONE
  *owners, last = words
  owner = owners[-1] if owners else ""
  if _SECRETS.fullmatch(last) or (last == "key" and _KEY_OWNERS.fullmatch(owner)):
    return Secrecy.CERTAIN
  if last == "token" and not _VOCABULARY.fullmatch(owner):
    is_certain = _TOKEN_OWNERS.fullmatch(owner) or (owner and name.isupper())
    return Secrecy.TOKEN if is_certain else Secrecy.MAYBE
  if last == "tokens" and _TOKEN_OWNERS.fullmatch(owner):
    return Secrecy.TOKEN
  return Secrecy.NONE


def is_secret(name: str, value: str) -> bool:
  """Returns whether a text is secret because of its name."""
  said = secrecy(name)
  if said is Secrecy.NONE or not value:
    return False
  names_place = name in _DIRECTORIES or name.lower().endswith("credentials")
  is_place = said is Secrecy.CERTAIN and names_place and value.startswith(("/", "~", "./"))
  if said is not Secrecy.MAYBE:
    return not is_place
  is_word = len(value) < 8 or not (len(value) >= 20 or any(c.isdigit() for c in value))
  return not (is_word or " " in value or value.startswith(("<", "[")))
