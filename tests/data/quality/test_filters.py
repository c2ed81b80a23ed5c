"""Each rule leaves out what it is for, keeps the rest, and none fails."""

import pickle
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ultrathink_jax.config import QualityConfig
from ultrathink_jax.data.documents import Document, Part, plain
from ultrathink_jax.data.quality.filters import make_filter
from ultrathink_jax.errors import ConfigError

UNHURRIED = settings(deadline=None)  # the machine may be busy

PROSE = (
  "The river rose in the night and by the morning the lower fields were under water. "
  "Nobody had expected it so early in the year, and the boats were still in their sheds."
)
CODE = 'def area(width, height):\n  """Returns the area."""\n  return width * height\n'
STRICT = QualityConfig(
  min_chars=20, max_chars=1000, min_alphanumeric=0.6, max_punctuation=0.3, max_repetition=0.2, scripts=("Latin",),
  max_line_chars=400, max_mean_line_chars=200,
)  # fmt: skip


def reason(text, **options):
  return make_filter(QualityConfig(**options))(plain("name", text))


@pytest.mark.parametrize("text", [PROSE, CODE, PROSE + "\n" + CODE, "Ein kurzer Satz über Äpfel und Öl, wie üblich."])
def test_sound_text_is_kept_by_all_rules_at_once(text):
  assert make_filter(STRICT)(plain("name", text)) is None


@pytest.mark.parametrize(
  ("text", "options", "expected"),
  [
    ("a" * 19, {"min_chars": 20}, "too_short"),
    ("a" * 20, {"min_chars": 20}, None),
    (" " * 50 + "a" * 19, {"min_chars": 20}, "too_short"),
    ("", {"min_chars": 1}, "too_short"),
    ("a" * 21, {"max_chars": 20}, "too_long"),
    ("a" * 20, {"max_chars": 20}, None),
    ("short\n" + "a" * 11, {"max_line_chars": 10}, "long_line"),
    ("a" * 10 + "\n" + "b" * 10, {"max_line_chars": 10}, None),
    ("a" * 10 + "\n" + "b" * 14, {"max_mean_line_chars": 11}, "long_lines"),
    ("a" * 10 + "\n" + "b" * 14, {"max_mean_line_chars": 12}, None),
    ("ab 1\x00\x01", {"min_alphanumeric": 0.67}, "low_alphanumeric"),
    ("ab 1\x00\x01", {"min_alphanumeric": 0.66}, None),
    ("漢字かな", {"min_alphanumeric": 1.0}, None),
    ("a.b!c?+$", {"max_punctuation": 0.6}, "much_punctuation"),
    ("a.b!c?+$", {"max_punctuation": 0.625}, None),
    ("Привет, world", {"scripts": ("Latin",), "min_script": 0.5}, "other_script"),
    ("Привет, world", {"scripts": ("Latin",), "min_script": 0.45}, None),
    ("Привет, world", {"scripts": ("Latin", "Cyrillic"), "min_script": 1.0}, None),
    ("Привет", {"scripts": ("Greek",)}, "other_script"),
    ("hello", {"scripts": ("Greek",)}, "other_script"),
    ("123 + 456 = 579 µ", {"scripts": ("Greek",), "min_script": 1.0}, None),
    ("かなカナ漢字ー", {"scripts": ("Han", "Hiragana", "Katakana"), "min_script": 1.0}, None),
    ("same line\n" * 3 + "another one", {"max_repetition": 0.47}, "repeated_lines"),
    ("same line\n" * 3 + "another one", {"max_repetition": 0.48}, None),
    ("  indented\nindented\n\tindented\nother", {"max_repetition": 0.5}, "repeated_lines"),
    ("\n" * 100 + "one\n\n\ntwo", {"max_repetition": 0.01}, None),
    ("one two three four five six seven eight nine ten " * 8, {"max_repetition": 0.5}, "repeated_words"),
    (PROSE, {"max_repetition": 0.001}, None),
  ],
)
def test_a_rule_holds_exactly_to_its_limit(text, options, expected):
  assert reason(text, **options) == expected


def test_no_rule_is_on_unless_it_is_asked_for():
  for text in ("", "...", "\x00" * 100, "a\n" * 1000, "x" * 10000):
    assert reason(text) is None


@UNHURRIED
@given(st.text(st.characters(exclude_categories=[]), max_size=200))
def test_filters_take_any_text(text):
  assert make_filter(STRICT)(plain("name", text)) in (
    None, "too_short", "long_line", "low_alphanumeric", "much_punctuation", "other_script", "repeated_lines",
    "repeated_words",
  )  # fmt: skip


@UNHURRIED
@example("\u845b\U000e0100")  # an ideograph and the mark that selects a form of it
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=100))
def test_shares_equal_those_counted_by_character(text):
  is_space = lambda c: c.isspace() and c not in "\x1c\x1d\x1e\x1f"  # separators of records, space to Python alone
  alphanumeric = sum(is_space(c) or unicodedata.category(c)[0] in "LMN" for c in text)
  if text:
    share = alphanumeric / len(text)
    assert reason(text, min_alphanumeric=max(share - 1e-9, 0.0)) is None
    assert share == 1 or reason(text, min_alphanumeric=share + 1e-9) == "low_alphanumeric"


def test_the_text_of_all_parts_and_sequences_counts():
  document = Document("name", ((Part("abc", False), Part("def")), (Part("ghi"),)))
  assert make_filter(QualityConfig(min_chars=10))(document) is None
  assert make_filter(QualityConfig(min_chars=11))(document) == "too_short"


def test_a_filter_survives_pickling():
  restored = pickle.loads(pickle.dumps(make_filter(STRICT)))
  assert restored(plain("name", "!")) == "too_short"


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"min_alphanumeric": 1.5}, "min_alphanumeric=1.5"),
    ({"max_punctuation": -0.1}, "max_punctuation=-0.1"),
    ({"max_repetition": float("nan")}, "max_repetition=nan"),
    ({"min_chars": -1}, "min_chars=-1"),
    ({"min_chars": 10, "max_chars": 5}, "max_chars=5"),
    ({"scripts": ("Klingon",)}, "'Klingon'"),
    ({"scripts": ("Latin}",)}, "'Latin}'"),
    ({"decontamination_words": 0}, "decontamination_words=0"),
  ],
)
def test_a_wrong_option_is_named(options, named):
  with pytest.raises(ConfigError, match="quality") as caught:
    make_filter(QualityConfig(**options))
  assert named in str(caught.value)


def test_languages_are_told_apart():
  pytest.importorskip("py3langid")
  german = "Der Fluss stieg in der Nacht, und am Morgen standen die unteren Felder unter Wasser."
  options = {"languages": ("en", "fr"), "min_language": 0.5}
  assert reason(PROSE, **options) is None
  assert reason(german, **options) == "other_language"
  with pytest.raises(ConfigError, match="'tlh'"):
    make_filter(QualityConfig(languages=("tlh",)))
