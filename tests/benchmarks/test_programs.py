import re

import numpy as np
import pytest

from benchmarks import decode, kernels, limits, step_time
from benchmarks.ours import OurTraining, next_token_batch
from benchmarks.shapes import make_config, with_batch
from ultrathink_jax.models.counts import count_model

pytestmark = pytest.mark.slow  # whole programs, a compilation each

MINIATURE = ["--shape=tiny", "--dtype=float32", "--batch_size=8", "--sequence_length=16"]  # one row for each device


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
  """Measures the machine's limits on little: these tests read the pages, not the numbers."""
  monkeypatch.setitem(limits._MATMUL_DIM, "cpu", 64)
  monkeypatch.setattr(limits, "_STREAM_BYTES", 2**16)


def test_step_time_prints_speed_mfu_with_its_formula_memory_and_operations(capsys, tmp_path):
  profile = f"--profile={tmp_path}"
  step_time.main(["", *MINIATURE, "--model=mamba", "--rounds=1", "--steps=1", "--peak_tflops=1", profile])
  page = capsys.readouterr().out
  assert re.search(r"\[profile\] operation +runs +total ms +share\n\[profile\] \S+ ", page)
  assert "5,922,656 parameters" in page
  assert float(re.search(r"- tokens/s: ([\d,]+)", page)[1].replace(",", "")) > 0
  assert re.search(r"MFU: [\d.]+% of 8 x 1.00 TFLOP/s \(--peak_tflops\)", page)
  assert "6 x active parameters" in page
  assert re.search(r"peak memory: [\d.]+ GiB", page)
  assert re.search(r"compile: [\d.]+ s", page)


def test_decode_prints_rates_and_the_bound(capsys):
  decode.main(["", *MINIATURE, "--batch_sizes=2", "--prompt_tokens=8", "--new_tokens=16", "--rounds=1"])
  page = capsys.readouterr().out
  assert re.search(r"bandwidth: [\d.]+ GB/s \(measured in this run", page)
  assert re.search(r"^\| 2 \|.*\d%", page, re.MULTILINE)


@pytest.mark.parametrize("kernel", kernels.FORMS)
def test_kernels_prints_a_line_for_every_form(kernel, capsys):
  kernels.main(["", *MINIATURE, "--batch_size=1", f"--kernel={kernel}", "--repeats=1"])
  page = capsys.readouterr().out
  for form in kernels.FORMS[kernel]:
    assert f"| {kernel} | {form} |" in page


@pytest.mark.parametrize(("kernel", "form"), [
  ("attention", "blockwise"), ("ssd", "chunked"), ("experts", "sorted"), ("cross_entropy", "chunked"),
  ("conv1d", "reference"),
])  # fmt: skip
def test_the_forms_of_a_cpu_run_forward_and_backward(kernel, form):
  config = with_batch(make_config("tiny", "dense", "float32"), 1, 16)
  assert kernels.temporary_bytes(kernel, form, config) > 0


def test_the_scan_takes_memory_in_proportion_to_the_length():
  config = make_config("tiny", "mamba", "float32")
  short, long = (kernels.temporary_bytes("ssd", "chunked", with_batch(config, 1, length)) for length in (512, 2048))
  assert long / short == pytest.approx(4, rel=0.1)


def test_memory_prints_the_logits_that_are_never_held(capsys):
  kernels.main(["", *MINIATURE, "--memory", "--length=128", "--length=256", "--vocab_size=1000"])
  page = capsys.readouterr().out
  assert re.search(r"^\| 256 \|", page, re.MULTILINE)
  assert re.search(r"^\| chunked \| [\d.]+ \| 0.5 \|", page, re.MULTILINE)  # 8 x 16 x 1000 x 4 bytes


def test_one_row_that_decodes_reads_its_own_experts_and_many_read_all():
  model = make_config("tiny", "moe", "bfloat16").model
  count = count_model(model)
  fixed = count.cache_bytes_per_token * 100
  assert decode.bytes_per_step(model, 1, 100) == pytest.approx(2 * (count.active - count.embedding) + fixed)
  many = decode.bytes_per_step(model, 10_000, 0)
  assert many == pytest.approx(2 * (count.total - count.embedding), rel=1e-3)


def test_the_step_that_is_timed_learns_its_batch():
  run = OurTraining(with_batch(make_config("tiny", "dense", "float32"), 8, 16))
  assert run.first_loss == pytest.approx(np.log(8192), abs=0.1)
  run(8)
  assert run.loss < run.first_loss - 0.02


def test_targets_are_the_next_tokens_and_the_last_has_none():
  batch = next_token_batch(np.arange(6, dtype=np.int32).reshape(2, 3))
  np.testing.assert_array_equal(batch.targets[:, :2], [[1, 2], [4, 5]])
  np.testing.assert_array_equal(batch.weights, [[1, 1, 0], [1, 1, 0]])
