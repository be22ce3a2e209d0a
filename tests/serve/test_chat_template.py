"""Chat templates: published forms render as plain Jinja renders them; hostile ones are bounded."""

from __future__ import annotations

import json
import time
from datetime import datetime

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dure.errors import DureError, ModelFileError, UsageError
from dure.serve.chat import ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helper<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + \
message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"""
TOOLS = """{%- macro render(tool) %}{{ tool.name ~ ': ' ~ tool | tojson(indent=2) }}{% endmacro -%}
{%- set ns = namespace(last=-1, seen=[]) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == "user" %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- if tools %}{% for tool in tools %}{{ render(tool) }}
{% if not loop.last %}, {% endif %}{% endfor %}{% endif %}
{% for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- if loop.previtem is defined and loop.previtem.role == message.role %}+{% endif %}
    {%- set think %}<{{ message.content.split('</think>')[-1].lstrip('\n') }}>{% endset %}
    {%- generation %}{{ message.role | upper }}{{ think }}{% endgeneration %}
    {%- for key, value in message | items %} {{ key }}={{ value | length }}{% endfor %}
    {{- "%s/%d" | format(message.role, loop.index) }} {{ "%-4s|" % message.role }}
    {{- {"a": [1, 2, loop.length]} | tojson }} {{ [1, 2] + [3] }} {{ (1, 2) }}
    {{- messages | selectattr("role", "equalto", "user") | map(attribute="content") | join(", ") }}
{% endfor %}{{ ns.last }}{{ missing is defined }}{{ enable_thinking | default(true) }}
{{- range(3) | list }}{{ "a" * 3 }}{{ "%05.1f" % 2.25 }}{{ "x{}y{b}".format(1, b="c") }}"""

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief. <b> & 'q' \"d\""},
        {"role": "user", "content": " 두레란 무엇인가요? \n"},
        {"role": "assistant", "content": "<think>hm</think>\n\n함께 일하는 풍습입니다."},
        {"role": "user", "content": "더 👨‍🌾"},
    ],
]
ALL_TOOLS = [{"name": "f", "description": "<é>", "parameters": {"z": 1, "a": [None, True]}}]


def plain_jinja(source: str, **variables: object) -> str:
    """The environment of Hugging Face's apply_chat_template, without any bounds."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    source = source.replace("{%- generation %}", "{%- if true %}")
    source = source.replace("{% endgeneration %}", "{% endif %}")
    return environment.from_string(source).render(**variables)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, TOOLS])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_plain_jinja_does(source: str, messages: list, prompt: bool) -> None:
    template = ChatTemplate(source, "<bos>", "<eos>")
    expected = plain_jinja(
        source,
        messages=messages,
        tools=ALL_TOOLS,
        bos_token="<bos>",
        eos_token="<eos>",
        add_generation_prompt=prompt,
    )
    assert template.render(messages, add_generation_prompt=prompt, tools=ALL_TOOLS) == expected


def test_chatml_text() -> None:
    assert ChatTemplate(CHATML).render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helper<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_time_and_variables() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }} {{ enable_thinking }}")
    text = template.render([{"role": "user", "content": ""}], enable_thinking=False)
    assert text == f"{datetime.now():%d %b %Y} False"


@pytest.mark.parametrize("source", [None, ""])
def test_base_model(source: str | None) -> None:
    with pytest.raises(UsageError, match="base model"):
        ChatTemplate(source)


def test_the_template_refuses_the_conversation() -> None:
    messages = [{"role": "assistant", "content": "I begin"}]
    with pytest.raises(UsageError, match="roles must alternate"):
        ChatTemplate(GEMMA).render(messages)


@pytest.mark.parametrize("messages", [[], [{}], [{"role": ""}], [{"role": 3, "content": "x"}]])
def test_malformed_messages(messages: list) -> None:
    with pytest.raises(UsageError):
        ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in %}",
        "{{ 'unclosed }}",
        "{% endfor %}",
        "{{ x | no_such_filter }}",
        "{% include 'other' %}",
        "{% extends 'other' %}",
        "{{ messages.no.attribute }}",
        "{{ messages + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[0]['content'] + none }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ undefined_function() }}",
        "{% set x %}" * 500 + "{% endset %}" * 500,
        "(" * 5000,
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{% for a in messages %}" * 60 + "{% endfor %}" * 60,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now('%9999999d') }}",
    ],
)
def test_broken_templates_are_named_errors(source: str) -> None:
    if source.startswith("((("):
        assert ChatTemplate(source).render([{"role": "user", "content": "x"}]) == source
        return
    with pytest.raises((ModelFileError, UsageError)):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


BIG = "{% set ns = namespace(x='aaaaaaaa', l=[1, 2], d={}) %}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "loops over literals": "{% for a in [1,2,3,4,5,6,7,8,9,0] %}" * 15 + "{% endfor %}" * 15,
    "loops over a list": "{% set l = range(50000) | list %}"
    + "{% for a in l %}" * 4
    + "{% endfor %}" * 4,
    "static text": "{% for a in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "doubling +": BIG + "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling ~": BIG + "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling %": BIG
    + "{% for i in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling format": BIG
    + "{% for i in range(99) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling a block": BIG
    + "{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    + "{% set ns.x = y %}{% endfor %}",
    "doubling a list": BIG + "{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "nesting a list": BIG
    + "{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nesting a tuple": BIG
    + "{% for i in range(99) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l }}",
    "nesting a dict": BIG
    + "{% for i in range(99) %}{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}{{ ns.d }}",
    "nesting dict()": BIG
    + "{% for i in range(99) %}{% set ns.d = dict(a=ns.d, b=ns.d) %}{% endfor %}"
    + "{{ ns.d | tojson }}",
    "times": "{{ 'a' * 9999999999 }}",
    "times a list": "{{ [1] * 9999999999 }}",
    "times, reversed": "{{ 9999999999 * 'a' }}",
    "power": "{{ 9 ** 99999999 }}",
    "product": "{% set ns = namespace(x=10) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'a' | center(9999999999) }}",
    "method center": "{{ 'a'.center(9999999999) }}",
    "method ljust": "{{ 'a'.ljust(width=9999999999) if false else 'a'.zfill(9999999999) }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "mapped center": "{{ ['a'] | map('center', 9999999999) | list }}",
    "percent width": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "filter format": "{{ '%9999999999d' | format(1) }}",
    "format width": "{{ '{:9999999999}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "format_map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "indent": "{{ 'a\n' | indent(9999999999) }}",
    "json indent": "{{ [1] | tojson(indent=9999999999) }}",
    "replace": "{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}",
    "replace method": "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 100000 %}{{ range(99999) | join(a) }}",
    "join method": "{% set a = 'a' * 100000 %}{{ a.join(['b'] * 100000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(99999) }}",
    "many outputs": "{% set a = 'a' * 1000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "recursive macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "macro text": "{% macro f() %}"
    + "x" * 100_000
    + "{% endmacro %}{% for i in range(99999) %}{% set a = f() %}{% endfor %}",
    "a long source": "x" * 300_000,
    "constant folding": "{{ 'a' | center(99999) | replace('', 'a' | center(99999)) }}",
    "batch": "{{ [1] | batch(9999999999, 0) | list }}",
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_templates_are_bounded(name: str) -> None:
    start = time.process_time()
    with pytest.raises(ModelFileError, match=r"uses too much|failed|too deep"):
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}])
    assert time.process_time() - start < 15


def test_a_long_conversation_is_within_the_bounds() -> None:
    messages = [
        {"role": "user" if index % 2 == 0 else "assistant", "content": "word " * 200}
        for index in range(2000)
    ]
    for source in (CHATML, LLAMA3, GEMMA):
        assert len(ChatTemplate(source).render(messages)) > 2_000_000


def test_errors_are_dure_errors_with_a_fix() -> None:
    with pytest.raises(DureError) as caught:
        ChatTemplate("line one\n{{ none + 1 }}").render([{"role": "user", "content": "x"}])
    assert caught.value.fix and "chat template" in caught.value.where
