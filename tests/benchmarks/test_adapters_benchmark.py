import jax
import pytest

from benchmarks.adapters import ADAPTED, FULL, adapted, is_defined, table, time_in_turns
from benchmarks.ours import OurTraining
from benchmarks.shapes import make_config, with_batch


@pytest.mark.slow  # four compilations
def test_the_table_sets_each_run_beside_full_fine_tuning_from_one_base():
  config = with_batch(make_config("tiny", "dense", "float32"), 8, 16)  # one row for each device
  base = jax.device_get(OurTraining(config).state.params)
  kinds = FULL, "LoRA all", "LoRA all, int4"
  runs = {kind: OurTraining(adapted(config, kind, 2), base) for kind in kinds}
  seconds = time_in_turns(runs, rounds=2, steps=1)
  assert all(len(own) == 2 and min(own) > 0 for own in seconds.values())
  full, lora, few_bits = (runs[kind] for kind in kinds)
  assert full.first_loss == lora.first_loss != few_bits.first_loss
  assert full.frozen_bytes == 0
  assert 0 < few_bits.frozen_bytes < lora.frozen_bytes / 2
  assert few_bits.program_bytes < lora.program_bytes < full.program_bytes
  rows = table(runs, seconds, dict.fromkeys(runs, 2**20)).splitlines()[2:]
  assert [row.split(" | ")[0] for row in rows] == [f"| {kind}" for kind in kinds]
  assert "1.00 (1.00 - 1.00)" in rows[0]


def test_models_without_attention_have_no_run_that_adapts_it():
  kinds = {
    model: [k for k in ADAPTED if is_defined(make_config("tiny", model, "float32"), k)] for model in ("moe", "mamba")
  }
  assert set(kinds["moe"]) - set(kinds["mamba"]) == {"LoRA attention"}
