"""Tokenizers in the files that transformers reads."""

import json
import random
from pathlib import Path

from ultrathink_jax.data.json_tokenizer import JsonTokenizer
from ultrathink_jax.data.sentence_piece import SENTENCEPIECE_KEY, SentencePieceTokenizer
from ultrathink_jax.data.tokenizer import Tokenizer

_NUM_PROBES = 200
_PIECES_PER_PROBE = 64


def save_for_transformers(directory: Path, tokenizer: Tokenizer) -> str:
  """Writes the tokenizer and returns "" or, where transformers cannot read it or reads it otherwise, one line on that.

  A SentencePiece model is written as it is, and as a tokenizer.json where both give the same tokens.
  """
  tokenizer.save(directory)
  if isinstance(tokenizer, JsonTokenizer):
    return ""
  if not isinstance(tokenizer, SentencePieceTokenizer):
    return "the tokenizer is one of numbers, which transformers does not have"
  path, settings_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
  path.write_text(_as_json(tokenizer))
  names = {f"{name}_token": tokenizer.piece(number) for name, number in _special_ids(tokenizer).items()}
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **names,
    "clean_up_tokenization_spaces": False,
    SENTENCEPIECE_KEY: tokenizer.fingerprint,
  }
  settings_path.write_text(json.dumps(settings, indent=2) + "\n")
  read_back = JsonTokenizer(path)
  if all(read_back.encode(text) == tokenizer.encode(text) for text in _probes(tokenizer)):
    return ""
  path.unlink()
  settings_path.unlink()
  return "tokenizer.json would give other tokens than tokenizer.model, so that only the latter was written"


def _special_ids(tokenizer: SentencePieceTokenizer) -> dict[str, int]:
  return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id}


def _as_json(tokenizer: SentencePieceTokenizer) -> str:
  """Returns a byte-pair encoder with the same pieces.

  Spaces stay spaces in its pieces, so that a text that holds SentencePiece's own symbol for them falls back to bytes
  there as here. A piece is merged from every pair of pieces it can be cut into, in the order of the pieces.
  """
  from tokenizers import AddedToken, decoders, models, processors
  from tokenizers import Tokenizer as Encoder

  pieces = [tokenizer.piece(number) for number in range(tokenizer.vocab_size)]
  vocabulary = {piece: number for number, piece in enumerate(pieces)}
  ordinary = {number for number in range(tokenizer.vocab_size) if tokenizer.is_ordinary(number)}
  merges = []
  for number in sorted(ordinary, key=lambda number: -tokenizer.score(number)):
    piece = pieces[number]
    # Longer left parts first: merging from the left leaves runs of one symbol in falling lengths.
    for cut in range(len(piece) - 1, 0, -1):
      left, right = piece[:cut], piece[cut:]
      if vocabulary.get(left) in ordinary and vocabulary.get(right) in ordinary:
        merges.append((left, right))
  special = _special_ids(tokenizer)
  encoder = Encoder(models.BPE(vocabulary, merges, unk_token=pieces[special["unk"]], byte_fallback=True))
  encoder.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
  encoder.add_special_tokens(
    [AddedToken(pieces[number], normalized=False, special=True) for number in special.values()]
  )
  bos = pieces[special["bos"]]
  encoder.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special["bos"])]
  )
  return encoder.to_str(pretty=True)


def _probes(tokenizer: SentencePieceTokenizer) -> list[str]:
  """Returns texts of random pieces, runs of one character, and characters that are not in the vocabulary."""
  choose = random.Random(0)
  special = set(_special_ids(tokenizer).values())
  pieces = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size) if number not in special]
  texts = ["".join(choose.choices(pieces, k=_PIECES_PER_PROBE)) for _ in range(_NUM_PROBES)]
  texts += [character * length for character in " \n\ta=#" for length in range(1, 70)]
  return [*texts, "\u2581 \u2581\u2581x", "\U0001f600\u00e9e\u0301\ufb01\u212b", "\0\x01\x7f\r\n\f\v\u00a0\u3000"]
