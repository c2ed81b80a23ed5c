"""Templates that nobody has read reach nothing of Python, and end soon without much memory."""

import subprocess
import sys
import time

import pytest

from ultrathink_jax.data.chat import ChatTemplate
from ultrathink_jax.errors import ConfigError

ESCAPES = [
  "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "{{ ''['__class__'] }}",
  "{{ messages | attr('__class__') }}",
  "{{ messages | map(attribute='__class__') | list }}",
  "{{ messages | map('attr', '__class__') | list }}",
  "{{ messages | sort(attribute='__class__') }}",
  "{{ '{0.__class__}'.format(1) }}",
  "{{ '{0.__class__}'.format_map(messages[0]) }}",
  "{% set f = ''.format %}{{ f(1) }}",
  "{{ cycler.__init__.__globals__ }}",
  "{{ lipsum.__globals__['os'] }}",
  "{{ raise_exception.__globals__ }}",
  "{{ strftime_now.__code__ }}",
  "{{ self.__init__.__globals__ }}",
  "{{ namespace.__init__ }}",
  "{{ dict.mro() }}",
  "{{ (1).real.__class__ }}",
  "{{ messages.append(1) }}",
  "{{ messages[0].update(role='x') }}",
  "{{ messages[0].pop('role') }}",
  "{% include '/etc/passwd' %}",
  "{% import 'os' as os %}",
  "{% extends 'base' %}",
  "{% macro f() %}{{ caller._func.__globals__ }}{% endmacro %}{% call f() %}{% endcall %}",
  "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
  "{% for m in messages %}{{ loop._iterator.__class__ }}{% endfor %}",
]
GROWING = "{%% set ns = namespace(s='ab' * 999, l=[1], n=3) %%}{%% for i in range(99) %%}%s{%% endfor %%}"
BOMBS = [
  "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
  "{% for a in range(10**9) %}{% endfor %}",
  "{{ 'a' * 10**12 }}",
  "{{ [1] * 10**12 }}",
  "{{ 10**10**10 }}",
  GROWING % "{% set ns.s = ns.s ~ ns.s %}",
  GROWING % "{% set ns.s = ns.s + ns.s %}",
  GROWING % "{% set ns.s = ns.s | replace('a', ns.s) %}",
  GROWING % "{% set ns.s = ns.s.replace('a', ns.s) %}",
  GROWING % "{% set ns.s = ns.s.join(ns.s) %}",
  GROWING % "{% set ns.s = ns.s | list | join(ns.s) %}",
  GROWING % "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
  GROWING % "{% set ns.l = ns.l + ns.l %}",
  GROWING % "{% set ns.n = ns.n * ns.n %}",
  "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
  "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
  "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
  "{{ 'x'.ljust(10**10) }}",
  "{{ 'x' | center(10**10) }}",
  "{{ '%9999999999d' | format(1) }}",
  "{{ '%9999999999d' % 1 }}",
  "{{ strftime_now('%9999999999Y') }}",
  "{{ messages | tojson(indent=10**9) }}",
  "{{ (1).to_bytes(10**10, 'big') }}",
  "{{ messages | batch(10**10, 0) | list }}",
  "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
  "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{{ s | upper | length }}{% endfor %}",
  "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{{ s.count('b') }}{% endfor %}",
  "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{{ s[1:] | length }}{% endfor %}",
  "{% for i in range(99999) %}" + "x" * 99_999 + "{% endfor %}",
  "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
  "x" * 2_000_000,
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_way_out_of_the_sandbox_is_refused(source):
  with pytest.raises(ConfigError, match="chat template"):
    ChatTemplate("hostile", "{% for m in messages %}{{ m.content }}{% endfor %}" + source)


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_a_template_that_would_not_end_is_refused_soon(source):
  start = time.process_time()
  with pytest.raises(ConfigError) as error:
    ChatTemplate("hostile", source)
  assert time.process_time() - start < 10
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 300


def test_all_of_them_together_take_less_than_a_gigabyte():
  program = """
import re, sys
sys.path.insert(0, "tests/data")
from test_template_sandbox import BOMBS
from ultrathink_jax.data.chat import ChatTemplate
from ultrathink_jax.errors import ConfigError
for source in BOMBS:
  try:
    ChatTemplate("hostile", source)
  except ConfigError:
    pass
print(int(re.search("VmHWM:[^0-9]*([0-9]+) kB", open("/proc/self/status").read()).group(1)) // 1024)
"""
  out = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True)
  assert int(out.stdout) < 1024


@pytest.mark.parametrize(
  "source", ["{% if x", "{{ x | nofilter }}", "{% nosuchtag %}", "{{ x.y.z }}", "", "{% generation %}"]
)
def test_a_template_with_a_mistake_is_a_config_error_of_one_line(source):
  with pytest.raises(ConfigError) as error:
    ChatTemplate("wrong", source)
  assert "\n" not in str(error.value)
