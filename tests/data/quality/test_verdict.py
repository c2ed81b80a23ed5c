"""A document meets all rules in one call, the same in every process."""

import pickle
import subprocess
import sys
from collections import Counter

import pytest

from ultrathink_jax.data.documents import Document, Part, plain
from ultrathink_jax.data.quality import QualityConfig, clusters, make_quality, signature

PROSE = "The river rose in the night and by the morning all of the lower fields were under water."
KEY = "AK" + "IA" + "QWERTY234567ASDF"
MAIL = "ann@example.org"


@pytest.fixture
def quality(tmp_path):
  (tmp_path / "exam.txt").write_text(PROSE.replace("river", "sea"))
  return make_quality(
    QualityConfig(
      min_chars=10,
      scrub_secrets=True,
      scrub_contacts=True,
      duplicate_similarity=0.8,
      decontaminate=(str(tmp_path / "exam.txt"),),
    )
  )


def test_a_sound_document_is_kept_as_it_is(quality):
  document = plain("name", "A quite different sentence about boats.")
  verdict = quality(document)
  assert verdict.document == document
  assert (verdict.reason, verdict.detail, verdict.num_scrubbed) == ("", "", Counter())
  assert verdict.signature == signature(document)


@pytest.mark.parametrize(
  ("text", "reason", "detail"), [("short", "too_short", ""), ("No. " + PROSE, "contaminated", "exam.txt")]
)
def test_a_document_that_is_left_out_says_why(quality, text, reason, detail):
  verdict = quality(plain("name", text))
  assert (verdict.reason, verdict.detail, verdict.signature, verdict.num_scrubbed) == (reason, detail, b"", Counter())


def test_secrets_go_from_every_part_and_parts_stay_parts(quality):
  document = Document("name", ((Part(f"key {KEY}", False), Part(f"mail {MAIL}")), (Part(f"{KEY} again"),)), True)
  verdict = quality(document)
  assert verdict.document == Document(
    "name", ((Part("key <SECRET>", False), Part("mail <EMAIL>")), (Part("<SECRET> again"),)), True
  )
  assert (verdict.reason, verdict.num_scrubbed) == ("", {"aws_key": 2, "email": 1})


def test_a_document_that_is_left_out_holds_no_secret(quality):
  assert quality(plain("name", KEY + " ")).document.text == "<SECRET> "


def test_documents_that_differ_in_secrets_alone_are_duplicates(quality):
  verdicts = [quality(plain(f"n{i}", f"{PROSE[:40]} key {KEY[:-1]}{i}")) for i in (2, 3)]
  assert clusters(["n2", "n3"], [v.signature for v in verdicts]).tolist() == [0, 0]


def test_each_document_has_one_verdict(quality):
  texts = ["short", "A sentence about boats.", KEY + " is a key", "tiny"]
  verdicts = [quality(plain(f"n{i}", text)) for i, text in enumerate(texts)]
  assert [v.reason for v in verdicts] == ["too_short", "", "", "too_short"]
  assert sum((v.num_scrubbed for v in verdicts), Counter()) == {"aws_key": 1}


def test_nothing_happens_unless_it_is_asked_for():
  document = plain("name", f"{KEY} {MAIL} !")
  assert make_quality(QualityConfig())(document) == (document, "", "", Counter(), b"")


def test_another_process_gives_the_same_verdict(quality):
  document = plain("name", f"{PROSE[:50]} {KEY} {MAIL}")
  code = (
    "import pickle, sys\nquality, document = pickle.load(sys.stdin.buffer)\n"
    "sys.stdout.buffer.write(pickle.dumps(quality(document)))\n"
    "assert not {'jax', 'torch', 'tensorflow'} & set(sys.modules)\n"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], input=pickle.dumps((quality, document)), capture_output=True, check=True, timeout=120
  )
  assert pickle.loads(run.stdout) == quality(document)
