"""Chat templates: Hugging Face's output, and an end to everything a template can try."""

import copy
import json
import time
from typing import Any

import pytest
from request.data_folder import data_folder
from request.make_chat_goldens import CASES, GOLDENS, SPECIAL_TOKENS, VARIABLES

from jinfer.errors import RequestError
from jinfer.request import chat
from jinfer.request.chat import ChatRenderer, choose_template, render_chat
from jinfer.request.tokenizer import load_tokenizer
from jinfer.shipped import draft_folder, target_folder
from jinfer.shipped.training.export import CHAT_TEMPLATE

_USER = [{"role": "user", "content": "hi"}]
_PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"


@pytest.fixture(scope="module")
def renderer():
    with ChatRenderer() as one:
        yield one


@pytest.mark.parametrize("case", CASES)
def test_templates_render_as_in_transformers(renderer: ChatRenderer, case: str) -> None:
    folder = data_folder("chat_templates")
    goldens = json.loads(GOLDENS.read_text(encoding="utf-8"))
    assert len(goldens) >= 35
    messages, options = CASES[case]
    variables = {**SPECIAL_TOKENS, **VARIABLES}
    for name, rows in goldens.items():
        template = (folder / name).read_text(encoding="utf-8")
        if "error" in rows[case]:
            with pytest.raises(RequestError, match="the chat template (refuses|fails on) these"):
                renderer.render(template, messages, variables=variables, **options)
        else:
            got = renderer.render(template, messages, variables=variables, **options)
            assert got == rows[case]["text"], name


def test_trim_blocks_and_tojson_follow_hugging_face(renderer: ChatRenderer) -> None:
    template = "  {% if true %}\n{{ {'b': '<é>', 'a': 1} | tojson }}\n  {% endif %}\n."
    assert renderer.render(template, _USER) == '{"b": "<é>", "a": 1}\n.'
    assert renderer.render("{{ {'a': [1]} | tojson(indent=2) }}", _USER) == (
        '{\n  "a": [\n    1\n  ]\n}'
    )


def test_extensions(renderer: ChatRenderer) -> None:
    loop = "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert renderer.render(loop, _USER) == "012"
    assert (
        renderer.render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", _USER)
        == "ahib"
    )
    assert renderer.render("{{ strftime_now('%Y') }}", _USER) >= "2024"


def test_variables_reach_the_template(renderer: ChatRenderer) -> None:
    template = "{{ bos_token }}{{ tools | length }}{{ thinking }}{{ eos_token }}"
    got = renderer.render(
        template, _USER, tools=[{"name": "f"}], variables={"bos_token": "<s>", "thinking": True}
    )
    assert got == "<s>1True"


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


_SHOW = "{% for p in c %}[{{ p.text }}]{% endfor %}"
READERS = {
    "directly": "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}"
    "{% endfor %}",
    "second name": "{% for m in messages %}{% set b = m.content %}{% set c = b %}"
    + _SHOW
    + "{% endfor %}",
    "macro": "{% macro show(c) %}"
    + _SHOW
    + "{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "filter": "{% for m in messages %}[{{ m.content | map(attribute='text') | join('][') }}]"
    "{% endfor %}",
    "only if no string": "{% for m in messages %}{% set c = m['con' ~ 'tent'] %}"
    "{% if c is string %}{{ c }}{% else %}" + _SHOW + "{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("reader", READERS)
def test_a_template_that_reads_lists_gets_them(renderer: ChatRenderer, reader: str) -> None:
    messages = [{"role": "user", "content": [*_parts("a"), "b"]}]
    assert renderer.render(READERS[reader], messages) == "[a][b]"


def test_a_template_that_needs_variables_gets_lists_too(renderer: ChatRenderer) -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ part_token + marks['x'] + p.text }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": _parts("a", "b")}]
    for mark in "!?":
        named = {"special_tokens": {"part_token": "<p>"}, "variables": {"marks": {"x": mark}}}
        assert renderer.render(template, messages, **named) == f"<p>{mark}a<p>{mark}b"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (_PLAIN, "<user>a\nb</>"),
        (_PLAIN.replace("m['content']", "m['content'] | trim"), "<user>a\nb</>"),
        ("{{ messages[0].content | tojson }}", '"a\\nb"'),
        ("{{ {'x': messages[0].content | string } | tojson }}", '{"x": "a\\nb"}'),
        ("{% for w in messages[0].content.split() %}[{{ w }}]{% endfor %}", "[a][b]"),
        # It reads the first part only, so a list would lose the others.
        ("{% set c = messages[0].content %}{{ c if c is string else c[0].text }}", "a\nb"),
        ("{% for c in messages[0].content %}{{ c }}.{% endfor %}", "a.\n.b."),
    ],
)
def test_other_templates_get_one_text(renderer: ChatRenderer, template: str, text: str) -> None:
    assert renderer.render(template, [{"role": "user", "content": _parts("a", "b")}]) == text


def test_each_role_is_decided_alone(renderer: ChatRenderer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% for p in m.content %}[{{ p.text }}]{% endfor %}"
        "{% else %}<{{ m.content | trim }}>{% endif %}{% endfor %}"
    )
    messages = [{"role": role, "content": _parts("a", "b")} for role in ("system", "user", "tool")]
    assert renderer.render(template, messages) == "<a\nb>[a][b]<a\nb>"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(RequestError, match="it says: no"):
        renderer.render(refuses + template, messages)


def test_the_content_format_overrides_the_decision(renderer: ChatRenderer) -> None:
    messages = [{"role": "user", "content": _parts("a", "b")}]
    reads = READERS["directly"]
    assert renderer.render(reads, messages, content_format="string") == "[][][]"
    assert renderer.render(reads, _USER, content_format="openai") == "[hi]"
    with pytest.raises(RequestError, match="must be 'auto', 'string' or 'openai'; got 'list'"):
        renderer.render(reads, messages, content_format="list")


@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_a_template_under_every_name(
    renderer: ChatRenderer, given: str, read: str
) -> None:
    template = "{% for m in messages %}{{ m.content }}({{ m." + read + " }}){% endfor %}"
    messages = [*_USER, {"role": "assistant", "content": "a", given: "because"}]
    assert renderer.render(template, messages) == "hi()a(because)"


_CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}"
)


def _call(arguments: object) -> list[dict[str, object]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*_USER, {"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"é": 1}, 'f({"é": 1})'),
        ('{"é":   1}', 'f({"é": 1})'),
        ("[1, 2]", "f([1, 2])"),
        ("", "f({})"),
        (None, "f({})"),
    ],
)
def test_arguments_of_tool_calls_are_encoded_once(
    renderer: ChatRenderer, arguments: object, text: str
) -> None:
    assert renderer.render(_CALLS, _call(arguments)) == text


def test_a_template_that_adds_the_arguments_to_text_gets_text(renderer: ChatRenderer) -> None:
    adds = _CALLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    assert renderer.render(adds, _call('{"a":1}')) == 'f({"a":1})'
    with pytest.raises(RequestError, match="fails on these messages; got TypeError"):
        renderer.render(adds, _call({"a": 1}))


def test_continue_final_message(renderer: ChatRenderer) -> None:
    messages = [*_USER, {"role": "assistant", "content": "So "}]
    got = renderer.render(_PLAIN, messages, continue_final_message=True)
    assert got == "<user>hi</><assistant>So "
    trims = _PLAIN.replace("m['content']", "m['content'] | trim")
    assert renderer.render(trims, messages, continue_final_message=True).endswith("<assistant>So")
    in_parts = [*_USER, {"role": "assistant", "content": [{"type": "text", "text": "So"}]}]
    assert renderer.render(_PLAIN, in_parts, continue_final_message=True).endswith("So")
    with pytest.raises(RequestError, match="template that writes out the last message"):
        renderer.render("{{ messages[0].content }}", messages, continue_final_message=True)
    with pytest.raises(RequestError, match="exclude each other; got both"):
        renderer.render(_PLAIN, messages, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(RequestError, match="needs content in the last message"):
        renderer.render(
            _PLAIN,
            [{"role": "assistant", "tool_calls": []}],
            continue_final_message=True,
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**10 }}", "MiB; got MemoryError"),
        ("{{ 'a'.center(10**10) }}", "MiB; got MemoryError"),
        ("{{ 'a' | center(10**9) }}", "MiB; got MemoryError"),
        ("{{ '%10000000000d' % 1 }}", "must finish within|fails on these messages"),
        ("{{ [0] * 10**9 }}", "MiB; got MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "got RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "must finish within"),
        (
            "{% set r = range(100000) | list %}"
            "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
            "finish within 1 s.*got (more time|no answer)",
        ),
        (
            "{% set ns = namespace(x='a') %}"
            "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "must finish within",
        ),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "at most 8388608 characters"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages; got SecurityError"),
        ("{{ messages.append(1) }}", "fails on these messages; got SecurityError"),
        ("{{ range(10**9) }}", "fails on these messages; got OverflowError"),
        ("{{ messages.x.y }}", "fails on these messages; got UndefinedError"),
        ("{% for %}", "must be valid Jinja; got .* at line 1"),
        ("{{ raise_exception('Take turns.') }}", "refuses these messages; it says: Take turns."),
        ("a" * (chat.MAX_TEMPLATE_CHARS + 1), "template has at most 262144 characters; got 262145"),
        (None, "template must be text; got None"),
    ],
)
def test_hostile_templates_end_in_a_sentence(
    renderer: ChatRenderer, template: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        renderer.render(template, _USER)
    assert renderer.render("ok", _USER) == "ok"  # the next request is unaffected


def test_a_worker_that_dies_or_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatRenderer() as renderer:
        assert renderer.render("ok", _USER) == "ok"
        renderer._worker._process.kill()
        with pytest.raises(RequestError, match="got exit status -9"):
            renderer.render("ok", _USER)
        assert renderer.render("ok", _USER) == "ok"
        monkeypatch.setattr(chat, "MAX_WALL_S", 0.0)
        with pytest.raises(RequestError, match="no answer in 0 s"):
            renderer.render("{% for i in range(100000) %}{% endfor %}", _USER)


def test_close_ends_the_process_and_is_repeatable() -> None:
    renderer = ChatRenderer()
    renderer.close()
    renderer.render("ok", _USER)
    process = renderer._worker._process
    renderer.close()
    renderer.close()
    assert process.poll() is not None
    renderer.render("ok", _USER)
    process = renderer._worker._process
    del renderer  # without close
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is not None


def test_render_chat_once() -> None:
    assert render_chat(_PLAIN, _USER, add_generation_prompt=True) == "<user>hi</>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages must be a list of dicts; got 'hi'"),
        ({"role": "user"}, "messages must be a list of dicts"),
        ([], "at least one message; got none"),
        (["hi"], r"messages\[0\] must be a dict with role and content; got 'hi'"),
        ([{"content": "x"}], r"messages\[0\] needs a role; got role=None"),
        ([{"role": "", "content": "x"}], "needs a role; got role=''"),
        ([*_USER, {"role": "user"}], r"messages\[1\] needs content; got only \['role'\]"),
        ([{"role": "user", "content": 3}], "must have text as its content; got content=3"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}],
            r"messages\[0\] part 0 must be of type \"text\"; got 'image_url'",
        ),
        ([{"role": "user", "content": [3]}], 'must be of type "text"; got 3'),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs text; got text=None"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "must be plain JSON values"),
    ],
)
def test_malformed_messages(renderer: ChatRenderer, messages: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        renderer.render(_PLAIN, messages)


def test_malformed_tools_and_size(renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="tools must be a list of dicts; got"):
        renderer.render(_PLAIN, _USER, tools="weather")
    with pytest.raises(RequestError, match="tools must be a list of dicts; got .* in it"):
        renderer.render(_PLAIN, _USER, tools=[print])
    monkeypatch.setattr(chat, "MAX_INPUT_BYTES", 100)
    with pytest.raises(RequestError, match="a chat has at most 100 bytes; got"):
        renderer.render(_PLAIN, _USER)


def test_choose_template() -> None:
    templates = {"default": "d", "tool_use": "t", "rag": "r"}
    assert choose_template(templates) == "d"
    assert choose_template(templates, tools=[{}]) == "t"
    assert choose_template({"default": "d"}, tools=[{}]) == "d"
    assert choose_template(templates, name="rag") == "r"
    with pytest.raises(RequestError, match=r"one of \['default', 'rag', 'tool_use'\]; got 'x'"):
        choose_template(templates, name="x")
    with pytest.raises(RequestError, match="needs a chat template; got a checkpoint without one"):
        choose_template({})


def test_the_story_models_tell_on_from_a_system_message(
    renderer: ChatRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without one, the chat is as before: paragraphs, and an open sentence that goes on."""
    template = load_tokenizer(target_folder()).chat_template
    assert template == load_tokenizer(draft_folder()).chat_template == CHAT_TEMPLATE

    def text(*said: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in said]
        named = {"bos_token": "<s>"}
        return renderer.render(
            CHAT_TEMPLATE, messages, add_generation_prompt=True, special_tokens=named
        )

    assert text(("system", "Be brief."), ("user", "Once upon a")) == "<s>Be brief.\n\nOnce upon a"
    assert text(("system", " "), ("user", "Hi.")) == text(("user", "Hi.")) == "<s>Hi.\n\n"
    assert text(("user", "A."), ("assistant", "B"), ("user", "C")) == "<s>A.\n\nB\n\nC"
    assert not caplog.records


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**m, "content": "\n".join(p["text"] for p in m["content"])} for m in messages]


@pytest.mark.agreement
def test_lists_reasoning_and_calls_agree_with_transformers(renderer: ChatRenderer) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, **SPECIAL_TOKENS)
    lists = [{"role": "user", "content": _parts("a", "b")}]
    thought = [*_USER, {"role": "assistant", "content": "a"}]
    calls, options = CASES["tool_talk"]
    as_text = copy.deepcopy(calls)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Zürich"}'

    def hf(template: str, messages: Any, **options: Any) -> str | None:
        messages = copy.deepcopy(messages)
        try:
            return theirs.apply_chat_template(
                messages, chat_template=template, tokenize=False, **options
            )
        except Exception:  # the template refuses
            return None

    def ours(template: str, messages: Any, **options: Any) -> str | None:
        try:
            return renderer.render(template, messages, special_tokens=SPECIAL_TOKENS, **options)
        except RequestError:
            return None

    num_lists = 0
    for path in sorted(data_folder("chat_templates").rglob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        reads_lists = path.name == "template_vlm2vec.jinja"
        num_lists += reads_lists
        want = hf(template, lists if reads_lists else _joined(lists))
        assert ours(template, lists) == want, path.name
        for name in ("reasoning", "reasoning_content", "thinking"):
            messages = [thought[0], {**thought[1], name: "because"}]
            assert ours(template, messages) == hf(template, messages), path.name
        # Some templates take the arguments as a dict and some as text.
        want = hf(template, calls, **options) or hf(template, as_text, **options)
        assert ours(template, as_text, **options) == want, path.name
    assert num_lists == 1
