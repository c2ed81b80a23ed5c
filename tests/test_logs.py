"""Lines reach the console and the file that their level says, without secrets."""

import logging
import re
import sys

import pytest

from ultrathink_jax import logs
from ultrathink_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def closed():
  yield
  logs.close()


def unhandle_root(monkeypatch):
  """Makes the root logger as in a program of its own: pytest's handlers are there only after fixtures."""
  monkeypatch.setattr(logging.getLogger(), "handlers", [])


def say_all():
  logs.debug("fine")
  logs.log("plain")
  logs.warn("strange")


def read(workdir):
  return (workdir / "train.log").read_text() if (workdir / "train.log").exists() else ""


@pytest.mark.parametrize(
  ("level", "output", "errors", "in_file"),
  [
    ("DEBUG", ["fine", "plain"], ["strange"], ["fine", "plain", "strange"]),
    ("INFO", ["plain"], ["strange"], ["plain", "strange"]),
    ("warning", [], ["strange"], ["plain", "strange"]),
    ("ERROR", [], [], ["plain", "strange"]),
  ],
)
def test_levels_choose_what_the_console_shows(tmp_path, monkeypatch, capsys, level, output, errors, in_file):
  monkeypatch.setenv("ULTRATHINK_LOG_LEVEL", level)
  logs.configure(tmp_path, True)
  say_all()
  shown = capsys.readouterr()
  assert (shown.out.splitlines(), shown.err.splitlines()) == (output, errors)
  assert [line.rsplit(" ", 1)[1] for line in read(tmp_path).splitlines()] == in_file


def test_lines_of_the_file_have_time_and_level(tmp_path):
  logs.configure(tmp_path, True)
  logs.warn("strange")
  assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING strange\n", read(tmp_path))


def test_a_wrong_level_is_a_mistake_of_configuration(tmp_path, monkeypatch):
  monkeypatch.setenv("ULTRATHINK_LOG_LEVEL", "LOUD")
  with pytest.raises(ConfigError, match="ULTRATHINK_LOG_LEVEL='LOUD' is not one of DEBUG, INFO, WARNING, ERROR"):
    logs.configure(tmp_path, True)


def test_a_library_says_nothing_and_writes_no_file(tmp_path, capsys, monkeypatch):
  unhandle_root(monkeypatch)
  monkeypatch.chdir(tmp_path)
  say_all()
  assert capsys.readouterr() == ("", "")
  assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_speaks(tmp_path, capsys):
  logs.configure(tmp_path, False)
  logs.log("plain")
  assert capsys.readouterr().out == ""
  assert list(tmp_path.iterdir()) == []


def test_errors_are_in_the_file_with_their_traceback_and_not_printed(tmp_path, capsys):
  logs.configure(tmp_path, True)
  try:
    raise ConfigError("train.steps=-1 is wrong")
  except ConfigError as error:
    logs.record_error(error)
  assert capsys.readouterr() == ("", "")
  assert "ERROR ConfigError: train.steps=-1 is wrong\nTraceback" in read(tmp_path)


def test_warnings_of_libraries_are_in_the_file_and_still_printed(tmp_path, capsys, monkeypatch):
  unhandle_root(monkeypatch)
  logs.configure(tmp_path, True)
  logging.getLogger("jax._src.xla_bridge").warning("no accelerator")
  logging.getLogger("orbax").info("saved")
  assert "WARNING no accelerator" in read(tmp_path)
  assert "saved" not in read(tmp_path)
  assert capsys.readouterr().err == "no accelerator\n"


def test_secrets_reach_neither_console_nor_file_nor_tracebacks(tmp_path, capsys, monkeypatch):
  unhandle_root(monkeypatch)
  monkeypatch.setenv("HF_TOKEN", "a-planted-secret")
  logs.configure(tmp_path, True)
  logs.log("read with a-planted-secret")
  logging.getLogger("jax").warning("api_key=%s", "a-planted-secret")
  try:
    raise ValueError("a-planted-secret is wrong")
  except ValueError as error:
    logs.record_error(error)
  shown = capsys.readouterr()
  assert "planted" not in shown.out + shown.err + read(tmp_path)
  assert read(tmp_path).count("<redacted>") >= 4


def test_the_file_rotates(tmp_path, monkeypatch):
  monkeypatch.setattr(logs, "_MAX_BYTES", 2000)
  logs.configure(tmp_path, True)
  for number in range(500):
    logs.log(f"line {number}")
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["train.log", *(f"train.log.{i}" for i in range(1, 6))]
  assert all((tmp_path / name).stat().st_size <= 2000 for name in names)
  assert read(tmp_path).endswith("line 499\n")


def test_a_file_that_cannot_be_written_is_given_up_with_one_line(tmp_path, capsys):
  (tmp_path / "train.log").mkdir()
  logs.configure(tmp_path, True)
  for _ in range(3):
    logs.log("plain")
  shown = capsys.readouterr()
  assert shown.out == "plain\n" * 3
  assert shown.err.count("cannot be written") == len(shown.err.splitlines()) == 1


def test_a_console_that_is_gone_ends_nothing(tmp_path, monkeypatch):
  class Broken:
    def write(self, text):
      raise BrokenPipeError

    flush = write

  logs.configure(tmp_path, True)
  monkeypatch.setattr(sys, "stdout", Broken())
  logs.log("plain")
  assert read(tmp_path).endswith("plain\n")


def test_other_libraries_tell_more_at_debug_until_the_end(tmp_path, monkeypatch):
  unhandle_root(monkeypatch)
  monkeypatch.setenv("ULTRATHINK_LOG_LEVEL", "DEBUG")
  logs.configure(tmp_path, True)
  logging.getLogger("orbax").info("saved")
  assert "INFO saved" in read(tmp_path)
  logs.close()
  assert logging.getLogger("orbax").level == logging.NOTSET


def test_configuring_again_replaces_what_was_before(tmp_path, capsys):
  logs.configure(None, True)
  logs.configure(tmp_path, True)
  logs.log("once")
  assert capsys.readouterr().out == "once\n"
