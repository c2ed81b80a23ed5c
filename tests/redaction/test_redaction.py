"""Twenty planted secrets are found wherever they stand; what only looks like them stays."""

import json
import random
import shlex
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from ultrathink_jax.redaction import REDACTED, redact

ALPHANUMERIC = string.ascii_letters + string.digits


def draw(alphabet, count, seed=0):
  """Random characters; made here, so that no scanner takes this file for a leak."""
  return "".join(random.Random(f"{alphabet}{count}{seed}").choices(alphabet, k=count))


def planted(number):
  return draw(ALPHANUMERIC, 24, number)


TOKEN = "eyJ" + draw(ALPHANUMERIC, 30) + ".eyJ" + draw(ALPHANUMERIC, 40) + "." + draw(ALPHANUMERIC, 43)
ENVIRONMENT = {
  "HF_TOKEN": "h" + "f_" + draw(ALPHANUMERIC, 34),
  "WANDB_API_KEY": draw("0123456789abcdef", 40),
  "AWS_SECRET_ACCESS_KEY": draw(ALPHANUMERIC + "/+", 40),
  "OPENAI_API_KEY": "s" + "k-proj-" + draw(ALPHANUMERIC, 48),
  "CORPUS_PASSWORD": "correct horse battery",
  "DEPLOY_SECRET": "plainword",
}
# A secret and a value that holds it.
PLANTED = {
  **{f"environment {name}": (value, {"environment": {name: value}}) for name, value in ENVIRONMENT.items()},
  "a bare wandb key": (ENVIRONMENT["WANDB_API_KEY"], f"wandb: using api_key={ENVIRONMENT['WANDB_API_KEY']}, logged in"),
  "an AWS key id": ("AK" + "IAIOSFODNN7EXAMPLE", "s3 refused AK" + "IAIOSFODNN7EXAMPLE for bucket corpus"),
  "a GitHub token": ("gh" + "p_" + draw(ALPHANUMERIC, 36), ["clone", "x:gh" + "p_" + draw(ALPHANUMERIC, 36)]),
  "a Hugging Face token": (ENVIRONMENT["HF_TOKEN"], f"401 for {ENVIRONMENT['HF_TOKEN']}"),
  "a model key": ("s" + "k-" + draw(ALPHANUMERIC, 40), {"url": "x", "headers": ["s" + "k-" + draw(ALPHANUMERIC, 40)]}),
  "a JSON web token": (TOKEN, {"cookie_jar": [{"value": TOKEN}]}),
  "a password in a URL": (planted(1), f"https://user:{planted(1)}@mlflow.example.com:5000/api"),
  "a token in a URL": (planted(2) + "7", f"git+https://{planted(2)}7@github.com/me/corpus"),
  "a signature in a URL": (planted(3), f"https://bucket.s3.amazonaws.com/a.parquet?X-Amz-Signature={planted(3)}&b=1"),
  "an argument with =": (planted(4), ["main.py", f"--config.log.api_key={planted(4)}", "--mode=train"]),
  "an argument after its name": (planted(5), ["main.py", "--hf_token", planted(5), "--mode", "train"]),
  "a quoted argument": ("two words", shlex.join(["main.py", "--password=two words", "--mode=train"])),
  "a joined command": (planted(6), shlex.join(["main.py", "--db-password", planted(6), "--steps=3"])),
  "a nested number": ("271828", {"a": [{"b": {"password": 271828}}]}),
  "a nested list": (planted(7), {"service": {"api_keys_and_more": 1, "access_tokens": ("x", planted(7))}}),
  "a nested mapping": (planted(8), {"client_secret": {"inner": {"value": planted(8)}}}),
  "JSON in a text": (planted(9), json.dumps({"n": 3, "private_key": planted(9), "m": [1]})),
  "JSON in JSON": (planted(10), json.dumps(json.dumps({"clientSecret": planted(10)}))),
  "a repr": (planted(11), repr({"accessToken": planted(11), "n": 1})),
  "a header": (planted(12), f"Authorization: Bearer {planted(12)}"),
  "a traceback": (planted(13), f'  File "x.py", line 3\n    connect(secret_key="{planted(13)}", n=3)\nValueError: no'),
  "a line of .env": (planted(14), f"export SLACK_TOKEN={planted(14)}\nN=3\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_secrets_are_gone(name):
  secret, value = PLANTED[name]
  assert secret in str(value)
  found = redact(value)
  assert secret not in str(found)
  assert REDACTED in str(found)
  assert redact(found) == found


def test_values_of_secret_variables_are_gone_wherever_they_stand(monkeypatch):
  for name, value in ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  for value in ENVIRONMENT.values():
    assert value not in redact(f"cannot read {value}: no such file")
    assert value not in str(redact({"argv": [["x", {"y": f"a{value}b"}]]}))


@pytest.mark.parametrize(
  "value",
  [
    "num_tokens=500 tokens_per_second=8,120 max_new_tokens: 128 cls_token='[CLS]' pad_token=<|endoftext|>",
    {"num_tokens": 500, "cls_token": "<s>", "special_tokens": ["<|im_end|>"], "eos_token": "finished"},
    {"tokens_per_second": 8120.5, "token": 17, "next_token": "holiday2024", "secrets": "scrub", "password": None},
    "[step] step=120/2000 loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 grad=0.83 eta=3m12s",
    "error: code.secrets='everything' is not one of scrub, drop, keep",
    "error: the tokenizer has no token '<|im_end|>'; token: the 17th",
    "ssh://git@github.com/me/corpus.git http://localhost:8080/a@b s3://bucket/key=value/part-0.parquet",
    ["main.py", "--config=configs/nano.py", "--config.data.tokenizer=bpe", "--source", "hf_models/llama"],
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 at 550e8400-e29b-41d4-a716-446655440000",
    "group_0/attention_1/mixer/key/kernel keys=3 task-scheduling-with-many-words-in-a-row-and-more",
    {"key": "value", "path": "/home/me/secret/plans.txt", "is_secret": True},
    (1, 2.5, None, True, {"a": []}),
  ],
)  # fmt: skip
def test_what_is_no_secret_stays(value):
  assert redact(value) == value


def test_short_and_numeric_variables_hide_nothing(monkeypatch):
  monkeypatch.setenv("USE_TOKEN", "1")
  monkeypatch.setenv("MAX_TOKEN", "1000000")
  monkeypatch.setenv("PAD_TOKEN", "padding")
  assert redact("step 1 of 1000000 padding") == "step 1 of 1000000 padding"


def test_the_default_configuration_has_no_secrets():
  values = json.loads(base.get_config().to_json_best_effort())
  assert redact(values) == values


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_redacting_twice_is_redacting_once(value):
  assert redact(redact(value)) == redact(value)


def test_hostile_text_takes_no_longer_than_its_length():
  begun = time.perf_counter()
  for text in (
    "a" * 100_000,
    "key=" * 25_000,
    "token:" * 20_000,
    "://" * 30_000,
    "-" * 100_000,
    "eyJ" * 30_000,
    '"' * 99_999,
  ):
    redact(text)
  assert time.perf_counter() - begun < 10


def test_the_directory_a_shell_stands_in_is_no_secret(monkeypatch):
  monkeypatch.setenv("PWD", "/home/someone/models")
  monkeypatch.setenv("OLDPWD", "/home/someone")
  monkeypatch.setenv("DB_PWD", "/home/else")
  text = "written to /home/someone/models/runs/nano, PWD=/home/someone/models"
  assert redact(text) == text
  assert redact("it is /home/else") == "it is <redacted>"
