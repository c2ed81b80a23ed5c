"""The report of a run is one self-contained page, whatever part of the run is there."""

import json
import re

import numpy as np
import pytest

from ultrathink_jax.report import html
from ultrathink_jax.report.drawing import MAX_POINTS, format_tick, smooth, thin

FACTS = {
  "name": "nano <1>",
  "command": "python -m ultrathink_jax.main --config=configs/nano.py",
  "model": {"layers": "(AE)x2", "parameters_total": 1_234_567, "parameters_active": 765_432},
  "device": {"kind": "cpu", "count": 1, "platform": "cpu"},
  "mesh": {"data": 1, "fsdp": 1},
  "memory": {"peak_bytes": 3 * 2**30},
  "result": {"step": 60, "loss": 2.0, "perplexity": 7.389, "bits_per_byte": 0.934, "gzip_bits_per_byte": 2.312},
  "samples": [{"prompt": "def <main>(", "completion": "<script>alert(1)</script>\ud800"}],
  "resumed_from_steps": [20],
}
CONFIG = {
  "recipe": "pretrain",
  "model": {"layers": "(AE)x2", "vocab_size": 64, "num_experts": 4},
  "train": {"steps": 60},
}


def make_run(workdir, num_steps=60, has_experts=True, facts=FACTS, config=CONFIG):
  random = np.random.default_rng(0)
  with (workdir / "metrics.jsonl").open("w") as file:
    for step in range(1, num_steps + 1):
      row = {"step": step, "loss": 2 + 2 / step, "learning_rate": 3e-4, "grad_norm": 50 / step, "tokens": 64 * step}
      row |= {"tokens_per_second": 8120.0, "step_seconds": 1.5}
      if has_experts:
        load = {f"layer_{layer}/moe": random.dirichlet(np.ones(4)).tolist() for layer in (1, 3)}
        row |= {"moe/entropy": 0.97, "moe/max_expert": 0.4, "moe/dropped": 0.0, "moe/load": load}
      file.write(json.dumps(row) + "\n")
  (workdir / "evaluations.jsonl").write_text('{"step": 50, "evaluate/loss": 2.1, "evaluate/bits_per_byte": 1.5}\n')
  (workdir / "run.json").write_text(json.dumps(facts))
  (workdir / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  make_run(workdir)
  path = html.write(workdir)
  assert path == workdir / "report.html"
  return path.read_text("utf-8")


def test_the_page_loads_nothing(page):
  assert "http:" not in page
  assert "https:" not in page
  assert not re.search(r"<(script|link|iframe|object)\b|@import", page)
  assert all(url.startswith(("data:", "#")) for url in re.findall(r"""(?:src|href|url)[=(]["']?([^"')]+)""", page))


def test_text_from_the_run_is_escaped(page):
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
  assert "<mark>def &lt;main&gt;(</mark>" in page
  assert "<h1>nano &lt;1&gt;</h1>" in page


def test_the_headline_compares_bits_per_byte_with_gzip(page):
  headline = page[page.index('<div class="headline">') : page.index("<figure")]
  for text in ("0.934", "2.312", "60% fewer bits than gzip -9", "2.0000", "7.389", "8,120", "1m30s"):
    assert text in headline


def test_the_heat_map_has_a_panel_per_layer_of_experts(page):
  figure = page[page.index("<h3>Expert load</h3>") :]
  wide = figure[: figure.index("</svg>")]
  assert wide.count("layer_") == 2
  assert wide.count("<image") == 3  # two layers and the colour bar


def test_the_heat_map_names_the_groups_of_experts(page, tmp_path):
  make_run(tmp_path, config=CONFIG | {"model": CONFIG["model"] | {"expert_groups": "knowledge=2,skill=1,safety=1"}})
  found = html.write(tmp_path).read_text()
  figure = found[found.index("<h3>Expert load</h3>") :]
  wide = figure[: figure.index("</svg>")]
  assert [wide.count(f">{name}<") for name in ("knowledge", "skill", "safety")] == [2, 2, 2]
  assert ">expert<" not in wide
  assert ">expert<" in page


def test_dead_experts_are_counted(page, tmp_path):
  make_run(tmp_path, 3)
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text().replace('"moe/dropped"', '"moe/dead": 2, "moe/dropped"'))
  assert "2 experts get less than a tenth of an even share" in html.write(tmp_path).read_text()
  assert "a tenth" not in page


def test_figures_take_their_colours_from_the_page(page):
  drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
  assert set(re.findall(r"var\((--\w+)\)", drawn)) == {"--ink", "--muted", "--grid", "--blue", "--orange"}
  assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#ffffff"}


def test_facts_and_settings_are_listed(page):
  for text in ("1,234,567 (1.23 M)", "3.0 GiB", "one device", "60 steps, complete", "vocab_size"):
    assert text in page


def test_a_run_without_experts_has_no_expert_section(tmp_path):
  make_run(tmp_path, has_experts=False)
  page = html.write(tmp_path).read_text()
  assert "Expert load" not in page
  assert "Routing" not in page
  assert "<h3>Loss</h3>" in page


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_short_run_has_every_figure(tmp_path, num_steps):
  make_run(tmp_path, num_steps)
  page = html.write(tmp_path).read_text()
  for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Expert load", "Routing"):
    assert f"<h3>{title}</h3>" in page
  assert f"{num_steps} of 60 steps" in page


def test_a_killed_run_reports_its_last_evaluation(tmp_path):
  make_run(tmp_path, 30, facts={})
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 31, "lo')
  page = html.write(tmp_path).read_text()
  assert "30 of 60 steps" in page
  assert "2.1000" in page
  assert "1.500" in page
  assert "gzip" not in page


def test_an_empty_directory_gives_a_page(tmp_path):
  page = html.write(tmp_path).read_text()
  assert f"<h1>{tmp_path.name}</h1>" in page
  assert "no step logged yet" in page
  assert "<figure" not in page


def test_a_run_of_losses_that_are_not_finite_gives_a_page(tmp_path):
  rows = [{"step": step, "loss": None, "grad_norm": None, "tokens_per_second": 1.0} for step in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  page = html.write(tmp_path).read_text()
  assert "<h3>Throughput</h3>" in page
  assert "<h3>Loss</h3>" not in page


def test_unknown_metrics_are_plotted_by_their_name(tmp_path):
  rows = [{"step": step, "dre/<depth>": step / 2} for step in range(1, 60)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert "<h3>dre/&lt;depth&gt;</h3>" in html.write(tmp_path).read_text()


def test_a_long_run_makes_a_small_page(tmp_path):
  make_run(tmp_path, 2000)
  assert html.write(tmp_path).stat().st_size < 1.5e6


def test_smoothing_keeps_a_constant_and_skips_gaps():
  values = np.full(300, 0.3)
  assert np.array_equal(smooth(values), values)
  values[100] = np.nan
  assert np.array_equal(smooth(values), np.full(300, 0.3))


def test_thinning_keeps_spikes():
  values = np.zeros(50_000)
  values[31_415], values[27_182] = 9.0, -9.0
  steps, kept = thin(np.arange(50_000), values)
  assert len(kept) <= MAX_POINTS
  assert steps[kept.argmax()] == 31_415
  assert steps[kept.argmin()] == 27_182


@pytest.mark.parametrize(
  ("value", "text"),
  [(12_000, "12,000"), (0.25, "0.25"), (0, "0"), (3e-4, "3e−4"), (-1.5, "−1.5")],  # noqa: RUF001
)
def test_tick_labels(value, text):
  assert format_tick(value) == text
