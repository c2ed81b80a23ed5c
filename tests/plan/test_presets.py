import pytest

from configs.presets import PRESETS
from tests.plan.golden_shardings import CHOSEN, lines, num_devices, path_of, preset_config, text
from ultrathink_jax.parallel.mesh import axis_sizes, check_division

EVERY = [(model, preset) for model, presets in PRESETS.items() for preset in presets]


@pytest.mark.parametrize(("model", "preset"), EVERY)
def test_every_preset_is_of_all_its_devices_and_divides_its_model(model, preset):
  config = preset_config(model, preset)
  check_division(config, axis_sizes(config.mesh, num_devices(preset)))


@pytest.mark.parametrize(("model", "preset"), CHOSEN)
def test_parameters_lie_as_the_golden_file_says(model, preset):
  assert path_of(model, preset).read_text() == text(model, preset), "run python -m tests.plan.golden_shardings"


@pytest.mark.parametrize(("model", "preset"), CHOSEN)
def test_less_than_two_percent_of_the_parameters_are_whole_on_every_device(model, preset):
  found = lines(model, preset)
  assert sum(line.bytes for line in found if line.is_whole) < 0.02 * sum(line.bytes for line in found)


def test_an_unknown_preset_names_those_there_are():
  with pytest.raises(ValueError, match=r"ultra3b:v9-1 is not a preset; choose one of v5e-64"):
    preset_config("ultra3b", "v9-1")
