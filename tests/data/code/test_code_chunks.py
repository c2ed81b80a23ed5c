"""Chunks cover a file, hold their limits exactly and overlap by whole lines; middles of fill-in-the-middle as well."""

import itertools
import random

import pytest
from source_trees import LIBRARY, PARSER

from ultrathink_jax.data.code.chunks import cut
from ultrathink_jax.data.code.fim import choose_middle, draw
from ultrathink_jax.data.code.pieces import Pieces
from ultrathink_jax.data.code.tokens import EstimatedTokens, FimTokens, find_file_separator, find_fim_tokens

WORDS = ("fn", "let x = 1;", "}", "", "  ", "ä ö ü", "🦀" * 30, "a_very_long_name" * 20, "pub struct S;")


def words(text):
  """A tokenizer whose tokens cross line ends, so that lines have not as many tokens as the text of them."""
  return len(text.split(" ")) + text.count("\n") // 3


def characters(text):
  return len(text)


def random_text(seed):
  choose = random.Random(seed)
  return "\n".join(choose.choice(WORDS) for _ in range(choose.randrange(1, 300)))


def random_pieces(seed):
  """A text with stretches cut out at line starts."""
  content = random_text(seed).encode()
  starts = [0] + [i + 1 for i, byte in enumerate(content) if byte == 10]
  choose = random.Random(seed)
  cuts = [tuple(sorted(choose.choices(starts, k=2))) for _ in range(seed % 4)]
  return Pieces(content, cuts), content, cuts


@pytest.mark.parametrize("count", [characters, words, EstimatedTokens().count_tokens], ids=["chars", "words", "bytes"])
@pytest.mark.parametrize("seed", range(30))
def test_chunks_cover_everything_in_order_within_the_limit(seed, count):
  pieces, _, _ = random_pieces(seed)
  head, limit, overlap = "// path: a b.rs\n", 64 + 13 * seed, (seed % 5) * 6
  spans = list(cut(pieces, (), head, limit, overlap, count))
  whole = pieces.text(*pieces.span)
  assert all(count(head + pieces.text(*span)) <= limit for span in spans)
  done = pieces.span[0]
  for start, stop in spans:
    assert done < stop or not whole
    assert not pieces.text(done, start)
    assert start == done or count(pieces.text(start, done)) <= overlap
    done = stop
  assert done == pieces.span[1]


def test_chunks_overlap_by_as_many_whole_lines_as_fit():
  content = "".join(f"line {i:02d}\n" for i in range(40)).encode()  # 8 characters each
  pieces = Pieces(content)
  spans = list(cut(pieces, (), "", 80, 20, characters))
  assert all(after[0] == before[1] - 16 for before, after in itertools.pairwise(spans))


def test_chunks_end_between_items_where_one_ends_in_their_second_half():
  content = ("a = 1\n" * 7 + "b = 2\n" * 9).encode()
  assert next(cut(Pieces(content), [42], "", 60, 0, characters)) == (0, 42)
  assert next(cut(Pieces(content), [12], "", 60, 0, characters)) == (0, 60)


def test_a_line_longer_than_a_chunk_is_cut_between_characters():
  pieces = Pieces(("é🦀" * 500).encode())
  spans = list(cut(pieces, (), "", 64, 0, characters))
  assert "".join(pieces.text(*span) for span in spans) == "é🦀" * 500


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_text_without_the_cuts(seed):
  pieces, content, cuts = random_pieces(seed)
  kept = [byte for i, byte in enumerate(content) if not any(start <= i < stop for start, stop in cuts)]
  assert pieces.text(0, len(content)) == bytes(kept).decode()
  assert "".join(pieces.stretch(*line) for line in pieces.lines) == bytes(kept).decode()
  assert pieces.num_bytes == len(kept)


@pytest.mark.parametrize("level", ["char", "line", "item"])
@pytest.mark.parametrize("seed", range(30))
def test_prefix_middle_and_suffix_are_the_text(seed, level):
  pieces, _, _ = random_pieces(seed)
  span = pieces.span
  found, (start, stop) = choose_middle(pieces, span, (), {level: 1.0}, (seed,))
  assert found == (level if level != "item" else "line")
  assert span[0] <= start <= stop <= span[1]
  parts = [pieces.text(span[0], start), pieces.text(start, stop), pieces.text(stop, span[1])]
  assert "".join(parts) == pieces.text(*span)
  if found == "line" and pieces.num_bytes:
    assert parts[1]
    assert not parts[0] or parts[0].endswith("\n")


def test_at_level_item_the_middle_is_one_of_the_bodies():
  pieces = Pieces((LIBRARY + PARSER).encode())
  bodies = [(10, 40), (100, 160), (200, 220)]
  chosen = {choose_middle(pieces, (50, 300), bodies, {"item": 1.0}, (i,)) for i in range(50)}
  assert chosen == {("item", (100, 160)), ("item", (200, 220))}


def test_levels_are_drawn_by_their_weights():
  pieces = Pieces(LIBRARY.encode())
  levels = [choose_middle(pieces, pieces.span, (), {"char": 3.0, "line": 1.0}, (i,))[0] for i in range(2000)]
  assert 0.7 < levels.count("char") / 2000 < 0.8


def test_draws_depend_on_every_part_and_are_uniform():
  draws = [draw("seed", i) for i in range(4000)]
  assert draws == [draw("seed", i) for i in range(4000)]
  assert len(set(draws)) == 4000
  assert abs(sum(draws) / 4000 - 0.5) < 0.02


@pytest.mark.parametrize(
  ("vocabulary", "psm", "spm"),
  [
    ("<fim_prefix> <fim_suffix> <fim_middle>", "<fim_prefix>P<fim_suffix>S<fim_middle>",
     "<fim_prefix><fim_suffix>S<fim_middle>P"),
    ("<|fim_prefix|> <|fim_suffix|> <|fim_middle|>", "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>",
     "<|fim_prefix|><|fim_suffix|>S<|fim_middle|>P"),
    ("[PREFIX] [SUFFIX] [MIDDLE]", "[SUFFIX]S[PREFIX]P", "[SUFFIX]S[PREFIX]P"),
    ("", "<fim_prefix>P<fim_suffix>S<fim_middle>", "<fim_prefix><fim_suffix>S<fim_middle>P"),
  ],
)  # fmt: skip
def test_the_marks_are_those_the_tokenizer_has(vocabulary, psm, spm):
  tokens = find_fim_tokens(vocabulary.split().__contains__)
  assert tokens.order("P", "S", is_suffix_first=False) == psm
  assert tokens.order("P", "S", is_suffix_first=True) == spm


def test_a_family_of_which_a_token_is_missing_is_not_taken():
  assert find_fim_tokens({"<|fim_prefix|>", "<|fim_suffix|>"}.__contains__) == FimTokens(
    "<fim_prefix>", "<fim_suffix>", "<fim_middle>"
  )
  assert find_file_separator({"<|file_sep|>"}.__contains__) == "<|file_sep|>"
  assert find_file_separator(set().__contains__) == ""
