"""Secrets go, what looks like them stays."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.quality.secrets import scrub

UNHURRIED = settings(deadline=None)  # the machine may be busy

ALPHANUMERIC = string.ascii_letters + string.digits
BASE64 = ALPHANUMERIC + "+/"
HEX = "0123456789abcdef"


def draw(alphabet, count, seed=0):
  """Random characters; made here, so that no scanner takes this file for a leak."""
  return "".join(random.Random(f"{alphabet}{count}{seed}").choices(alphabet, k=count))


def key_block(kind, num_lines=12, separator="\n"):
  lines = [draw(BASE64, 64, i) for i in range(num_lines)]
  return separator.join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----"])


LETTERS = draw(ALPHANUMERIC, 48)
PLANTED = {
  "aws_key": "AK" + "IA" + draw(string.ascii_uppercase + "234567", 16),
  "aws_key temporary": "AS" + "IA" + draw(string.ascii_uppercase + "234567", 16),
  "github_token": "gh" + "p_" + draw(ALPHANUMERIC, 36),
  "github_token server": "gh" + "s_" + draw(ALPHANUMERIC, 36),
  "github_token fine": "github" + "_pat_" + draw(ALPHANUMERIC, 22) + "_" + draw(ALPHANUMERIC, 59),
  "gitlab_token": "gl" + "pat-" + draw(ALPHANUMERIC, 20),
  "huggingface_token": "h" + "f_" + draw(string.ascii_letters, 34),
  "model_api_key": "s" + "k-" + LETTERS,
  "model_api_key project": "s" + "k-proj-" + draw(ALPHANUMERIC + "_", 120),
  "model_api_key ant": "s" + "k-ant-api03-" + draw(ALPHANUMERIC + "_", 95),
  "slack_token": "xo" + "xb-" + draw(string.digits, 12) + "-" + draw(string.digits, 12) + "-" + draw(ALPHANUMERIC, 24),
  "google_key": "AI" + "za" + draw(ALPHANUMERIC + "_-", 34) + "a",
  "google_key oauth": "GOC" + "SPX-" + draw(ALPHANUMERIC, 28),
  "stripe_key": "s" + "k_live_" + draw(ALPHANUMERIC, 24),
  "service_token npm": "np" + "m_" + draw(ALPHANUMERIC, 36),
  "service_token pypi": "py" + "pi-AgE" + draw(ALPHANUMERIC, 120),
  "service_token sendgrid": "S" + "G." + draw(ALPHANUMERIC, 22) + "." + draw(ALPHANUMERIC, 43),
  "service_token docker": "dckr" + "_pat_" + draw(ALPHANUMERIC, 27),
  "service_token router": "s" + "k-or-v1-" + draw(HEX, 64),
  "telegram_token": draw("123456789", 10) + ":A" + "A" + draw(ALPHANUMERIC, 33),
  "json_web_token": "ey"
  + "J"
  + draw(ALPHANUMERIC, 33)
  + ".ey"
  + "J"
  + draw(ALPHANUMERIC, 70)
  + "."
  + draw(ALPHANUMERIC, 43),
  "private_key rsa": key_block("RSA PRIVATE" + " KEY"),
  "private_key": key_block("PRIVATE" + " KEY", 1),
  "private_key ssh": key_block("OPENSSH PRIVATE" + " KEY", 30),
  "private_key json": key_block("PRIVATE" + " KEY", 20, "\\n"),
  "private_key cut off": key_block("EC PRIVATE" + " KEY").rsplit("\n", 1)[0],
}
IN_CONTEXT = [
  ("url_password", "postgres://admin:{}@db.internal:5432/main", "s3cr1tpw9"),
  ("url_password", "git clone https://me:{}@git.host.org/x.git", draw(ALPHANUMERIC, 20)),
  ("webhook", "https://hooks.slack.com/services/{}", "T0ABCDE12/B0ABCDE12/" + LETTERS[:24]),
  ("authorization", "curl -H 'Authorization: Bearer {}' https://api", draw(ALPHANUMERIC, 40)),
  ("authorization", "'authorization': 'Basic {}'", draw(ALPHANUMERIC, 38) + "=="),
  ("assigned_secret", 'aws_secret_access_key = "{}"', draw(BASE64, 40)),
  ("assigned_secret", "const apiKey = '{}';", draw(HEX, 32)),
  ("assigned_secret", 'api_key: str = "{}"', draw(HEX, 40)),
  ("assigned_secret", '{{"client_secret": "{}"}}', draw(ALPHANUMERIC, 32)),
  ("assigned_secret", "AWS_SECRET_ACCESS_KEY={}", draw(BASE64, 40)),
  ("assigned_secret", "export SLACK_API_TOKEN={}\nnext", draw(HEX, 40)),
  ("assigned_secret", "accessToken => '{}',", draw(ALPHANUMERIC, 30)),
  ("password", 'password = "{}"', "hunter22"),
  ("password", "db.passwd: '{}'", "Tr0ub4dor&3"),
  ("password", "'PASSWORD': '{}',", draw(ALPHANUMERIC, 20)),
]  # fmt: skip
INNOCENT = [
  "num_tokens = 4096; max_new_tokens=64; pad_token = '<pad>'; eos_token_id: 50256",
  'token = tokenizer.encode("hello world")',
  "sha256 = 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'",
  "commit 1b65fc6332ef2a4b6ed5b7d9d0f8d1b0c1a2f3e4",
  "id = '550e8400-e29b-41d4-a716-446655440000'",
  "assert b64decode('TWFuIGlzIGRpc3Rpbmd1aXNoZWQsIG5vdCBvbmx5IGJ5IGhpcyByZWFzb24=') == text",
  "AKIA is the prefix of AWS keys, as in AKIA" + "IOSFODNN7EXAMPLE",
  "api_key = os.environ['OPENAI_API_KEY']",
  "api_key = os.environ.get('OPENAI_API_KEY', '')",
  'api_key="YOUR_API_KEY_GOES_HERE_12345"',
  'password = getpass.getpass("Password: ")',
  'password: "{{ vault_password }}"',
  "password = 'password123'",
  "if password == other_password: pass",
  'secret = "a secret is told to nobody"',
  'parser.add_argument("--hf_token", default=None)',
  "postgres://user:password@localhost/db",
  "postgres://user:${PASSWORD}@localhost/db and http://user:%s@host/",
  "see https://example.org:8080/a@b and http://localhost:3000/@scope/package",
  "ghp_" + "x" * 36,
  "class='sk-fading-circle sk-circle-fade-dot-with-many-words-in-it'",
  'BEGIN = "-----BEGIN RSA PRIVATE' + ' KEY-----"\nEND = "-----END RSA PRIVATE' + ' KEY-----"\n',
  "-----BEGIN CERTIFICATE-----\n" + draw(BASE64, 64) + "\n-----END CERTIFICATE-----",
  "ssh-rsa " + draw(BASE64, 200) + " name",
  "access_token_url = 'https://host.org/oauth2/v1/token'",
  "Authorization: Bearer <token>",
  "The secret: never give up. Its key=value pairs are public.",
  "import hf_transfer, sk_learn_extra; asia = 'ASIA'; xoxo-xoxo",
  "secret_key = load_secret_key_from_file(path)",
  "integrity sha512-" + draw(BASE64, 86) + "==",
]  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("context", ["{}", "before {} after", 'x = ["{}", 1]', "a\n{}\nb", "key={}&other=1"])
def test_a_planted_token_is_replaced_and_counted(name, context):
  text, counts = scrub(context.format(PLANTED[name]))
  assert text == context.format("<SECRET>")
  assert counts.total() == 1
  assert name.split()[0] in counts


@pytest.mark.parametrize(("kind", "context", "value"), IN_CONTEXT)
def test_a_secret_is_known_by_what_stands_around_it(kind, context, value):
  assert scrub(context.format(value)) == (context.format("<SECRET>"), {kind: 1})


@pytest.mark.parametrize("text", INNOCENT)
def test_what_looks_like_a_secret_stays(text):
  assert scrub(text) == (text, {})


def test_all_secrets_of_a_text_are_counted_by_kind():
  text = "\n".join([*PLANTED.values(), *PLANTED.values()])
  scrubbed, counts = scrub(text)
  assert scrubbed == "\n".join(["<SECRET>"] * (2 * len(PLANTED)))
  assert counts["github_token"] == 6
  assert counts.total() == 2 * len(PLANTED)


def test_addresses_are_replaced_on_request():
  text = "mail ann.lee+x@mail.example.org, not git@github.com:a/b, @property, 8.8.8.8, 127.0.0.1, 10.0.0.3, v1.2.3"
  assert scrub(text) == (text, {})
  scrubbed, counts = scrub(text + " 2001:4860:4860::8888 12:30:45", with_contacts=True)
  assert scrubbed == (
    "mail <EMAIL>, not git@github.com:a/b, @property, <IP_ADDRESS>, 127.0.0.1, 10.0.0.3, v1.2.3 <IP_ADDRESS> 12:30:45"
  )
  assert counts == {"email": 1, "ip_address": 2}


def test_a_secret_glued_to_another_is_found_too():
  hook = "https://hooks.slack.com/services/T0ABCDE12/B0ABCDE12/" + draw(ALPHANUMERIC, 40)
  assert scrub(hook + PLANTED["github_token"]) == (
    "https://hooks.slack.com/services/<SECRET><SECRET>",
    {"webhook": 1, "github_token": 1},
  )


PIECES = [*PLANTED.values(), *(context.format(value) for _, context, value in IN_CONTEXT), *INNOCENT]
GLUE = st.sampled_from(["", " ", "\n", "-", "_", ":", "@", "=", '"', "'", "://", "a", ".", "<SECRET>"])


@UNHURRIED
@given(st.lists(st.tuples(st.sampled_from(PIECES) | st.text(max_size=12), GLUE), max_size=8), st.booleans())
def test_scrubbing_again_changes_nothing(pieces, with_contacts):
  scrubbed, _ = scrub("".join(piece + glue for piece, glue in pieces), with_contacts=with_contacts)
  assert scrub(scrubbed, with_contacts=with_contacts) == (scrubbed, {})


@UNHURRIED
@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_can_be_scrubbed(text):
  assert scrub(text, with_contacts=True)[1].keys() <= {"email", "ip_address"}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
  "unit",
  [
    "a",
    "-----BEGIN PRIVATE" + " KEY-----",
    "eyJ",
    "eyJaaaaaaaaaa.",
    "password=",
    "://a:",
    "a.",
    "1.",
    "sk-",
    "a@",
    "ab:",
    "secret: ",
  ],
)
def test_repetitive_text_takes_linear_time(unit):
  scrub(unit * (400_000 // len(unit)), with_contacts=True)
