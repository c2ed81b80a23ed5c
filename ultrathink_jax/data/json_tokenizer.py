"""Tokenizers of the tokenizers library, as Hugging Face models come with."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from ultrathink_jax.errors import DataError

JSON_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
# What transformers reads beside tokenizer.json, kept so that a model can be written with what it came with.
_COMPANION_FILES = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class JsonTokenizer:
  """A tokenizer.json of the tokenizers library, with the special tokens that the files beside it name.

  Special tokens spelled in a text become their ids, as the library does. The exact round trip is the file's own affair:
  one that normalizes text does not give it back.
  """

  def __init__(self, path: Path):
    import tokenizers

    try:
      content = path.read_bytes()
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except OSError as error:
      raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises bare Exception
      raise DataError(f"{path} is not a file of the tokenizers library: {error}") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    files = {name: path.parent / name for name in _COMPANION_FILES}
    self._files = {JSON_FILE: content} | {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
    self.fingerprint = hashlib.sha256(content).hexdigest()
    self._special_ids = {name: self._special_id(name, path.parent) for name in ("bos", "eos")}
    bos_id, eos_id = self._special_ids.values()
    if eos_id is None:
      raise DataError(f"{path} has no EOS token; name eos_token in {SETTINGS_FILE} beside it")
    self.eos_id = eos_id
    self.bos_id = eos_id if bos_id is None else bos_id  # documents of such models are parted by EOS alone

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    hidden = (self.bos_id, self.eos_id)
    return self._tokenizer.decode([i for i in map(int, ids) if i not in hidden], skip_special_tokens=False)

  def save(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in self._files.items():
      (directory / name).write_bytes(content)
    # What config.json alone said would be lost without it.
    settings = read_json(directory / SETTINGS_FILE)
    found = {f"{name}_token": number for name, number in self._special_ids.items() if number is not None}
    unsaid = {key: self._tokenizer.id_to_token(found[key]) for key in found if settings.get(key) is None}
    if unsaid:
      (directory / SETTINGS_FILE).write_text(json.dumps(settings | unsaid, indent=2) + "\n")

  def _special_id(self, name: str, directory: Path) -> int | None:
    """Returns the id of bos or eos: of the token that a file of settings names, else the one in config.json."""
    for file in (SETTINGS_FILE, "special_tokens_map.json"):
      token = read_json(directory / file).get(f"{name}_token")
      token = token.get("content") if isinstance(token, dict) else token
      if token is not None and (number := self._tokenizer.token_to_id(token)) is not None:
        return number
    number = read_json(directory / "config.json").get(f"{name}_token_id")
    return number[0] if isinstance(number, list) else number


def read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a file, {} where there is no such file."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise DataError(f"{path} is not JSON: {error}") from error
