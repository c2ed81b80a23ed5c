"""Chat templates render as Hugging Face renders them, and say what the assistant says."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.chat import BUILT_IN, ChatTemplate, find_chat_template
from ultrathink_jax.data.documents import BadRecordError
from ultrathink_jax.errors import ConfigError

TURNS = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "One?"},
  {"role": "assistant", "content": "1"},
  {"role": "user", "content": "Two?"},
  {"role": "assistant", "content": "2"},
]
INSTRUCT = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>' ~ messages[0]['content'] | trim ~ '<</SYS>>' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- else %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
{%- endfor %}"""
TOOLS = """\
{%- macro described(tool) %}{{ tool | tojson }}{% endmacro %}
{%- set state = namespace(count=0, names=[]) %}
{%- if tools %}
{{- '<tools>' }}{% for tool in tools %}{{ described(tool) }}{{ "\\n" if not loop.last }}{% endfor %}{{ '</tools>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- set state.count = state.count + 1 %}
    {%- if state.count > 100 %}{% break %}{% endif %}
<{{ message.role | upper }}>
    {%- if message.role == 'assistant' %}
        {%- generation %}
{{- message['content'].replace('<', '&lt;') }}
            {%- for call in message.tool_calls or [] %}
                {{- call.function.name }}({{ call.function.arguments | dictsort | map('join', '=') | join(', ') }})
            {%- endfor %}
        {%- endgeneration %}
    {%- else %}
        {{- '%s/%s '.replace('%s', loop.index ~ '') + message.content }}
    {%- endif %}
{{ '</' ~ message.role | upper ~ '>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<ASSISTANT>' }}
{%- endif %}"""


def learned(parts):
  return [part.text for part in parts if part.is_learned]


def joined(parts):
  return "".join(part.text for part in parts)


def test_chatml_is_learned_to_the_end_of_each_turn_and_no_further():
  parts = find_chat_template("chatml").render(TURNS)
  assert joined(parts) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
    "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
  )
  assert learned(parts) == ["1<|im_end|>", "2<|im_end|>"]


def test_the_plain_template_needs_no_special_tokens():
  parts = find_chat_template("plain").render(TURNS[1:3])
  assert [tuple(part) for part in parts] == [("### User\nOne?\n\n### Assistant\n", False), ("1\n\n", True)]


def test_without_marks_the_assistant_is_found_by_what_its_turns_add():
  parts = ChatTemplate("instruct", INSTRUCT, "<s>", "</s>").render(TURNS)
  assert joined(parts) == "<s>[INST] <<SYS>>Be brief.<</SYS>>One? [/INST] 1</s>[INST] Two? [/INST] 2</s>"
  assert learned(parts) == [" 1</s>", " 2</s>"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_marks_and_growth_find_the_same_turns(name):
  without_marks = BUILT_IN[name].replace("{%- generation %}", "").replace("{% endgeneration %}", "")
  marked, grown = find_chat_template(name).render(TURNS), ChatTemplate("grown", without_marks).render(TURNS)
  assert joined(marked) == joined(grown)
  assert [text.rstrip() for text in learned(marked)] == [text.rstrip() for text in learned(grown)]


@pytest.mark.parametrize("source", [*BUILT_IN.values(), INSTRUCT])
def test_nothing_of_the_context_is_learned(source):
  template = ChatTemplate("template", source, "<s>", "</s>")
  parts = template.render(TURNS, num_context=4)
  assert joined(parts) == joined(template.render(TURNS))
  assert len(learned(parts)) == 1
  assert "2" in learned(parts)[0]
  assert joined(parts).startswith(template.prompt(TURNS[:4]))


@given(
  contents=st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=8).map(lambda c: c[: len(c) // 2 * 2]),
  name=st.sampled_from(list(BUILT_IN)),
)
@settings(max_examples=100, deadline=None)
def test_any_content_is_rendered_as_it_is_and_the_assistants_is_learned(contents, name):
  contents = [content.replace("\ufdd0", "").replace("\ufdd1", "") or "x" for content in contents]
  roles = ["user", "assistant"] * (len(contents) // 2)
  turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
  parts = find_chat_template(name).render(turns)
  answers = [content for role, content in zip(roles, contents, strict=True) if role == "assistant"]
  assert len(learned(parts)) == len(answers)
  assert all(text.startswith(answer) for text, answer in zip(learned(parts), answers, strict=True))
  assert all(content in joined(parts) for content in contents)


@pytest.mark.parametrize("source", [INSTRUCT, TOOLS, *BUILT_IN.values()])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_rendering_equals_that_of_transformers(source, add_generation_prompt):
  utilities = pytest.importorskip("transformers.utils.chat_template_utils")
  tools = [{"name": "add", "parameters": {"a": "<int>", "b": "ä"}}]
  call = {"function": {"name": "add", "arguments": {"b": 2, "a": 1}}}
  turns = [*TURNS[:4], {"role": "assistant", "content": "a < b", "tool_calls": [call]}]
  (expected,), _ = utilities.render_jinja_template(
    conversations=[turns], tools=tools, chat_template=source, add_generation_prompt=add_generation_prompt,
    bos_token="<s>", eos_token="</s>",
  )  # fmt: skip
  template = ChatTemplate("template", source, "<s>", "</s>")
  found = template.prompt(turns, tools) if add_generation_prompt else joined(template.render(turns, 0, tools))
  assert found == expected


def test_the_date_of_a_template_never_changes():
  source = BUILT_IN["chatml"] + "{{ strftime_now('%d %b %Y') }}"
  assert joined(ChatTemplate("date", source).render(TURNS[1:3])).endswith("01 Jan 2025")


def test_a_template_that_changes_earlier_turns_is_refused():
  source = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
  with pytest.raises(ConfigError, match="changes earlier turns"):
    ChatTemplate("forgetful", source)


def test_what_a_template_refuses_is_a_bad_record():
  template = ChatTemplate("instruct", INSTRUCT)
  with pytest.raises(BadRecordError, match="roles must alternate"):
    template.render([TURNS[1], TURNS[1]])


def test_a_template_without_anything_to_learn_is_refused():
  with pytest.raises(ConfigError, match="leaves nothing to be learned"):
    ChatTemplate("deaf", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")


def test_a_template_can_be_pickled():
  template = find_chat_template("chatml")
  assert pickle.loads(pickle.dumps(template)).render(TURNS) == template.render(TURNS)


def test_a_template_is_found_by_path_or_beside_its_tokenizer(tmp_path):
  tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": INSTRUCT}))
  expected = ChatTemplate(str(tmp_path), INSTRUCT, "<s>", "</s>")
  assert find_chat_template(str(tmp_path)) == expected
  assert find_chat_template("auto", str(tmp_path)) == expected
  assert find_chat_template("auto", str(tmp_path / "tokenizer_config.json")) == expected
  (tmp_path / "chat_template.jinja").write_text(BUILT_IN["plain"])
  assert find_chat_template("auto", str(tmp_path)).source == BUILT_IN["plain"]
  assert find_chat_template(str(tmp_path / "chat_template.jinja")).eos_token == "</s>"
  named = [{"name": "tools", "template": TOOLS}, {"name": "default", "template": INSTRUCT}]
  (tmp_path / "chat_template.jinja").unlink()
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
  assert find_chat_template(str(tmp_path)).source == INSTRUCT


def test_without_a_template_of_its_own_a_tokenizer_has_the_plain_one(tmp_path):
  assert find_chat_template("auto", str(tmp_path)).name == "plain"
  assert find_chat_template("auto", "sentencepiece").name == "plain"
  assert find_chat_template("none") is None


@pytest.mark.parametrize("name", ["chatlm", "/nowhere.jinja", ""])
def test_an_unknown_template_is_refused(name):
  with pytest.raises(ConfigError, match="chat_template"):
    find_chat_template(name)


@pytest.mark.parametrize("content", [b"\xff", b"{half", b"[]", b'{"chat_template": 1}'])
def test_damaged_files_of_a_tokenizer_are_a_config_error(tmp_path, content):
  (tmp_path / "tokenizer_config.json").write_bytes(content)
  with pytest.raises(ConfigError):
    find_chat_template(str(tmp_path))
