"""Keys, tokens and passwords in texts, and on request e-mail and IP addresses, replaced by markers.

What is taken for a secret:
- what has the published form of a token (a prefix such as ghp_, the length, the alphabet) and is not a placeholder:
  it has at least 8 different characters and none of the words people write in examples;
- blocks of private keys, signed JSON web tokens, passwords in URLs, values of Authorization headers;
- a value that is assigned to a name which ends in password, secret, api_key, access_token and the like: a quoted one
  of 16 characters or more with digits, letters and the entropy of a random string, or, for passwords, one of 6 or more
  with digits and letters and no word of a placeholder in it; or one without quotes that fills its line, as in .env
  files.
So hashes, UUIDs, base64 and names such as num_tokens stay, unless a name says that they are secret.

One pass of RE2 over a text finds the kinds that may be in it, mostly none; only their patterns, which need what RE2
lacks, are then looked for.
"""

import functools
import ipaddress
import re
from collections import Counter

import re2

from ultrathink_jax.redaction.forms import SECRETS, Kind

EMAIL, IP_ADDRESS = "<EMAIL>", "<IP_ADDRESS>"


def scrub(text: str, with_secrets: bool = True, with_contacts: bool = False) -> tuple[str, Counter[str]]:
  """Returns the text with markers for what is secret, and how many of each kind; a second time it changes nothing."""
  kinds = SECRETS * with_secrets + _CONTACTS * with_contacts
  counts: Counter[str] = Counter()
  while True:  # a marker ends a word, which may bring out what stood glued to a secret
    num_found = counts.total()
    for number in sorted(_hints(kinds).Match(text.encode("utf-8", "surrogatepass")) or ()):
      text = kinds[number].pattern.sub(functools.partial(_replace, kinds[number], counts), text)
    if counts.total() == num_found:
      return text, counts


@functools.cache
def _hints(kinds: tuple[Kind, ...]) -> re2.Set:
  options = re2.Options()
  options.encoding = re2.Options.Encoding.LATIN1  # takes bytes as they are, surrogates too
  hints = re2.Set.SearchSet(options)
  for kind in kinds:
    hints.Add(kind.hint.encode())
  hints.Compile()
  return hints


def _replace(kind: Kind, counts: Counter[str], match: re.Match[str]) -> str:
  if not kind.is_real(match["secret"]):
    return match[0]
  counts[kind.name] += 1
  start, stop = match.span("secret")
  return match.string[match.start() : start] + kind.marker + match.string[stop : match.end()]


def _is_public_address(value: str) -> bool:
  try:
    return ipaddress.ip_address(value).is_global
  except ValueError:
    return False


def _is_mail_address(value: str) -> bool:
  return not value.startswith("git@")


_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_CONTACTS = (
  Kind(
    "email",
    r"[\w.%+-]@[\w-]",
    re.compile(
      r"(?<![\w.%+-])(?P<secret>[A-Z0-9][\w.%+-]{0,63}@(?:[A-Z0-9-]{1,63}\.){1,8}[A-Z]{2,24})(?![\w@])", re.I | re.ASCII
    ),
    _is_mail_address,
    EMAIL,
  ),
  Kind(
    "ip_address",
    r"\d\.\d{1,3}\.\d{1,3}\.\d|[0-9a-fA-F]:[0-9a-fA-F]{0,4}:",
    re.compile(
      rf"(?<![\w.:-])(?P<secret>{_OCTET}(?:\.{_OCTET}){{3}}|(?:[0-9a-f]{{1,4}}:){{2,7}}[0-9a-f:]{{1,20}})(?![\w:-]|\.\d)",
      re.I | re.ASCII,
    ),
    _is_public_address,
    IP_ADDRESS,
  ),
)
