"""Entries of every format become documents of which the right part is learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_jax.data.chat import find_chat_template
from ultrathink_jax.data.documents import BadRecordError, Part, Record
from ultrathink_jax.data.formats import FORMATS, make_format
from ultrathink_jax.errors import ConfigError

CHATML = find_chat_template("chatml")
QUESTION, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
RENDERED = (
  Part("<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n", False),
  Part("A.<|im_end|>"),
  Part("\n", False),
)


def convert(fields, name="auto", template=None, text_field="text"):
  return make_format(name, text_field, template)(Record("file:1", fields))


def sequence(fields, **options):
  (only,) = convert(fields, **options).sequences
  return only


def test_a_text_is_learned_and_keeps_its_name():
  document = convert({"text": "some text"})
  assert document.name == "file:1"
  assert document.sequences == ((Part("some text"),),)
  assert document.label is None


def test_the_field_of_a_text_is_chosen():
  assert sequence({"content": "x", "text": "y"}, text_field="content") == (Part("x"),)


@pytest.mark.parametrize("name", ["auto", "prompt_completion"])
def test_of_a_prompt_and_a_completion_the_completion_is_learned(name):
  fields = {"prompt": "The sky is", "completion": " blue."}
  for template in (None, CHATML):
    assert sequence(fields, name=name, template=template) == (Part("The sky is", False), Part(" blue."))


def test_a_prompt_of_messages_is_rendered_with_its_completion():
  assert sequence({"prompt": [QUESTION], "completion": [ANSWER]}, template=CHATML) == RENDERED


def test_answers_in_a_prompt_of_messages_are_not_learned():
  parts = sequence(
    {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [{**ANSWER, "content": "B."}]}, template=CHATML
  )
  assert [part.text for part in parts if part.is_learned] == ["B.<|im_end|>"]


@pytest.mark.parametrize(
  "fields",
  [
    {"messages": [QUESTION, ANSWER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]}, ANSWER]},
    {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
    {"question": "Q?", "answer": "A."},
    {"instruction": "Q?", "input": "", "output": "A.", "text": "a prompt with its answer"},
    {"instruction": "Q?", "response": "A."},
    {"name": "task", "instruction": "Q?", "instances": [{"input": "", "output": "A."}]},
  ],
)
def test_conversations_by_any_name_are_the_same(fields):
  assert sequence(fields, template=CHATML) == RENDERED


@pytest.mark.parametrize(
  ("fields", "prompt"),
  [
    ({"question": "Q?", "answer": "A."}, "Q?\n\n"),
    ({"instruction": "Add.", "input": "1 2", "output": "A."}, "Add.\n\n1 2\n\n"),
  ],
)
def test_without_a_template_a_question_ends_with_a_blank_line(fields, prompt):
  assert sequence(fields) == (Part(prompt, False), Part("A."))


def test_tools_and_their_results_take_part_in_a_conversation():
  call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
  turns = [{"role": "system", "content": ""}, QUESTION, call, {"role": "tool", "content": "1"}, ANSWER]
  parts = sequence({"messages": turns}, template=CHATML)
  assert [part.text for part in parts if part.is_learned] == ["<|im_end|>", "A.<|im_end|>"]


def test_a_preference_has_two_sequences_with_the_same_prompt():
  document = convert({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})
  assert document.sequences == (
    (Part("The sky is", False), Part(" blue.")),
    (Part("The sky is", False), Part(" green.")),
  )


def test_a_preference_without_a_prompt_has_the_common_beginning_as_one():
  document = convert({"chosen": "The sky is blue.", "rejected": "The sky is black."})
  assert document.sequences == (
    (Part("The sky is", False), Part(" blue.")),
    (Part("The sky is", False), Part(" black.")),
  )
  assert convert({"chosen": "a", "rejected": "ab"}).sequences == ((Part("a"),), (Part("ab"),))


@pytest.mark.parametrize(
  "fields",
  [
    {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "B."}]},
    {"prompt": "Q?", "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "B."}]},
    {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, {**ANSWER, "content": "B."}]},
    {"prompt": "Q?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, {**ANSWER, "content": "B."}]},
  ],
)
def test_preferences_of_messages_are_rendered(fields):
  chosen, rejected = convert(fields, template=CHATML).sequences
  assert chosen == RENDERED
  assert rejected == (RENDERED[0], Part("B.<|im_end|>"), RENDERED[2])


@given(common=st.text("ab \n", max_size=8), chosen=st.text("ab \n", max_size=6), rejected=st.text("ab \n", max_size=6))
def test_a_preference_keeps_both_texts_and_learns_something_of_each(common, chosen, rejected):
  chosen, rejected = common + chosen, common + rejected
  if not chosen or not rejected or chosen == rejected:
    return
  one, other = convert({"chosen": chosen, "rejected": rejected}).sequences
  assert ("".join(part.text for part in one), "".join(part.text for part in other)) == (chosen, rejected)
  assert one[-1].is_learned
  assert other[-1].is_learned
  assert [part.text for part in one[:-1]] == [part.text for part in other[:-1]]


@pytest.mark.parametrize("label", [True, False])
def test_a_label_says_whether_a_completion_is_good(label):
  fields = {"prompt": "The sky is", "completion": " blue.", "label": label}
  for name in ("auto", "label"):
    document = convert(fields, name=name)
    assert document.label is label
    assert document.sequences == ((Part("The sky is", False), Part(" blue.")),)


def test_a_text_with_a_class_is_a_text():
  assert convert({"text": "a review", "label": 1}).label is None


def test_an_unknown_format_names_the_nearest():
  with pytest.raises(ConfigError, match="did you mean 'preference'"):
    make_format("prefrence", "text", None)


def test_the_format_of_messages_needs_a_template():
  with pytest.raises(ConfigError, match="chat_template"):
    make_format("messages", "text", None)


LONG = "k" * 1000
BAD = {
  "no fields": ("auto", {}, "has no fields"),
  "unknown fields": ("auto", {"body": "x", "url": "y"}, "has the fields 'body', 'url'; expected 'text'"),
  "long names": ("auto", {LONG + str(i): 1 for i in range(9)}, "has the fields"),
  "misspelt field": ("text", {"txt": "x"}, "lacks 'text'; did you mean 'txt'"),
  "missing field": ("text", {"a": 1}, "lacks 'text'; it has 'a'"),
  "number": ("text", {"text": 5}, "text is a number, not a string"),
  "null": ("text", {"text": None}, "text is null, not a string"),
  "list": ("text", {"text": ["a"]}, "text is a list, not a string"),
  "bytes": ("text", {"text": b"\xff"}, "text is bytes"),
  "empty": ("text", {"text": ""}, "text is empty"),
  "NUL": ("text", {"text": "a\0b"}, "text holds a NUL character at position 1"),
  "surrogate": ("text", {"text": "ab\ud800"}, "half a character .* at position 2"),
  "field of a long name": ("text", {LONG: "x"}, "lacks 'text'; it has 'kkk"),
  "completion missing": ("prompt_completion", {"prompt": "a"}, "lacks 'completion'"),
  "prompt missing": ("prompt_completion", {"completion": "a"}, "lacks 'prompt'"),
  "completion empty": ("prompt_completion", {"prompt": "a", "completion": ""}, "completion is empty"),
  "prompt empty": ("prompt_completion", {"prompt": "", "completion": "a"}, "prompt is empty"),
  "prompt of another kind": ("prompt_completion", {"prompt": 1, "completion": "a"}, "prompt is a number"),
  "completion messages": ("prompt_completion", {"prompt": "a", "completion": [ANSWER]}, "but completion is a list"),
  "prompt messages": ("prompt_completion", {"prompt": [QUESTION], "completion": "a"}, "prompt is a list, but"),
  "prompt ends with assistant": ("auto", {"prompt": [QUESTION, ANSWER], "completion": [ANSWER]}, "the user or a tool"),
  "completion by user": ("auto", {"prompt": [QUESTION], "completion": [QUESTION]}, "role 'user' after 'user'"),
  "two instances": ("auto", {"instruction": "a", "instances": [{"output": "a"}] * 2}, "has 2 instances"),
  "answer empty": ("auto", {"question": "a", "answer": ""}, "answer is empty"),
  "messages text": ("messages", {"messages": "hi"}, "messages is a string, not a list"),
  "messages empty": ("messages", {"messages": []}, "messages is an empty list"),
  "messages missing": ("messages", {"mesages": []}, "lacks 'messages'; did you mean 'mesages'"),
  "message text": ("messages", {"messages": ["hi"]}, r"messages\[0\] is a string, not an object"),
  "role missing": ("messages", {"messages": [{"content": "a"}]}, "lacks 'role'; it has 'content'"),
  "content missing": ("messages", {"messages": [{"role": "user"}]}, "lacks 'content'"),
  "value missing": ("messages", {"conversations": [{"from": "human"}]}, "lacks 'value'"),
  "role unknown": ("messages", {"messages": [{"role": "usr", "content": "a"}]}, "has the role 'usr'; it is"),
  "role a number": ("messages", {"messages": [{"role": 1, "content": "a"}]}, "has the role 1; it is"),
  "role long": ("messages", {"messages": [{"role": LONG, "content": "a"}]}, "has the role"),
  "content a number": ("messages", {"messages": [{"role": "user", "content": 1}]}, "content is a number"),
  "content empty": ("messages", {"messages": [{"role": "user", "content": ""}]}, "content is empty"),
  "content NUL": ("messages", {"messages": [{"role": "user", "content": "\0"}]}, "holds a NUL"),
  "image": ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' beside text"),
  "content reserved": ("messages", {"messages": [QUESTION, {"role": "assistant", "content": "\ufdd0"}]}, "is reserved"),
  "assistant first": ("messages", {"messages": [ANSWER]}, "role 'assistant' at the start; there belongs"),
  "tool first": ("messages", {"messages": [{"role": "tool", "content": "1"}]}, "role 'tool' at the start"),
  "user twice": ("messages", {"messages": [QUESTION, QUESTION]}, "role 'user' after 'user'"),
  "assistant twice": ("messages", {"messages": [QUESTION, ANSWER, ANSWER]}, "role 'assistant' after 'assistant'"),
  "late": ("messages", {"messages": [QUESTION, {"role": "system", "content": "x"}]}, "role 'system' after 'user'"),
  "user last": ("messages", {"messages": [QUESTION, ANSWER, QUESTION]}, "the assistant has the last word"),
  "only system": ("messages", {"messages": [{"role": "system", "content": "x"}]}, "the assistant has the last word"),
  "chosen empty": ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
  "rejected empty": ("preference", {"prompt": "a", "chosen": "b", "rejected": []}, "rejected is empty"),
  "chosen null": ("preference", {"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null"),
  "chosen a number": ("preference", {"chosen": 1, "rejected": "b"}, "chosen is a number"),
  "equal": ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
  "chosen missing": ("preference", {"prompt": "a", "rejected": "b"}, "lacks 'chosen'"),
  "chosen text, rejected messages": ("preference", {"chosen": "a", "rejected": [ANSWER]}, "but rejected is a list"),
  "no common prompt": ("preference", {"chosen": [QUESTION, ANSWER], "rejected": [ANSWER]}, "no prompt in common"),
  "no answer": ("preference", {"chosen": [QUESTION], "rejected": [QUESTION, ANSWER]}, "one answer is empty"),
  "numbers": ("preference", {"chosen": [1], "rejected": [2]}, "no prompt in common"),
  "preference prompt null": ("preference", {"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is null"),
  "label a number": ("label", {"prompt": "a", "completion": "b", "label": 1}, "label is a number, not true or false"),
  "label a string": ("label", {"prompt": "a", "completion": "b", "label": "true"}, "label is a string"),
  "label missing": ("label", {"prompt": "a", "completion": "b"}, "lacks 'label'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_entry_says_why_in_one_short_line(case):
  name, fields, expected = BAD[case]
  with pytest.raises(BadRecordError, match=expected) as error:
    convert(fields, name=name, template=CHATML)
  assert len(f"data/train.jsonl:1234567: {error.value}") <= 200
  assert str(error.value).isprintable()


VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.text(max_size=5)
  | st.binary(max_size=3)
  | st.sampled_from(["user", "a"]),
  lambda children: (
    st.lists(children, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "type", "tool_calls"]), children)
  ),
  max_leaves=6,
)
KEYS = ["text", "prompt", "completion", "label", "messages", "conversations", "chosen", "rejected", "instruction"]
KEYS += ["output", "question", "answer", "input", "instances", "tools"]


@given(fields=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), name=st.sampled_from(list(FORMATS)))
def test_whatever_an_entry_holds_it_gives_a_document_or_a_reason(fields, name):
  try:
    document = convert(fields, name=name, template=CHATML)
  except BadRecordError as error:
    reason = str(error)
    assert len(reason) <= 150
    assert reason.isprintable()
  else:
    assert all(any(part.is_learned and part.text for part in parts) for parts in document.sequences)
    document.text.encode()
