import pytest

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.patterns import Group, parse, spell

LETTERS = "AEFLM"


@pytest.mark.parametrize(
  ("pattern", "groups"),
  [
    ("AF", [("AF", 1)]),
    ("(AF)x12", [("AF", 12)]),
    ("M (MA)x2 F", [("M", 1), ("MA", 2), ("F", 1)]),
    ("(MMMMAFMMME)x4", [("MMMMAFMMME", 4)]),
    ("(AF)", [("AF", 1)]),
  ],
)
def test_a_pattern_spells_groups(pattern, groups):
  assert parse(pattern, LETTERS) == tuple(Group(*group) for group in groups)


def test_spell_writes_repeats_out():
  assert spell(parse("M(AF)x3", LETTERS)) == "MAFAFAF"


@pytest.mark.parametrize(
  ("pattern", "character"),
  [("AZF", 2), ("(AZ)x2", 3), ("(AF", 4), ("(AF)x", 6), ("(AF)x0", 6), ("(AF)xx", 6), ("()x2", 2), ("A)", 2), ("", 1),
   ("((A))", 2), ("Ax3", 2), ("a", 1)],
)  # fmt: skip
def test_a_wrong_pattern_is_refused_at_its_character(pattern, character):
  with pytest.raises(ConfigError) as error:
    parse(pattern, LETTERS)
  place = f"character {character} (" if character <= len(pattern) else "its end"
  assert place in str(error.value)
  assert f"{pattern[: character - 1]}>>>{pattern[character - 1 :]}" in str(error.value)
