import pytest

from hsae.train.config.run_config import RunConfig
from hsae.train.training.curriculum import Curriculum


def run(**changes):
    values = {"number": 0, "name": "r", "structure": "additive", "widths": (13, 7, 3), "l0": (3, 2, 1)}
    return RunConfig(**{**values, **changes})


def test_coarse_first_adds_levels_from_the_coarsest_and_frees_all_at_forty_percent():
    curriculum = Curriculum(run(curriculum="coarse-first"), 1000)
    levels = {step: curriculum.at(step).stage.levels for step in (0, 299, 300, 349, 350, 400)}
    assert levels == {0: (3,), 299: (3,), 300: (3, 2), 349: (3, 2), 350: (3, 2, 1), 400: (3, 2, 1)}
    assert curriculum.at(360).stage.rates == {3: 0.0, 2: 0.0}
    assert curriculum.at(400).stage.rates == {}
    assert curriculum.at(999).warmup_starts == {3: 0, 2: 300, 1: 350}


def test_fine_first_is_the_reverse_order():
    curriculum = Curriculum(run(structure="stacked", curriculum="fine-first"), 100)
    assert [curriculum.at(step).stage.levels for step in (0, 30, 35)] == [(1,), (1, 2), (1, 2, 3)]


def test_composition_is_off_then_ramps_then_stays_and_the_proximal_step_comes_last():
    curriculum = Curriculum(run(curriculum="coarse-first"), 100)
    assert curriculum.at(39).composition == 0
    ramp = [curriculum.at(step).composition for step in range(40, 60)]
    assert ramp == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert curriculum.at(59).stage.sparsify is False
    assert (curriculum.at(60).composition, curriculum.at(60).stage.sparsify) == (1, True)


def test_stages_of_ones_own():
    stages = (
        {"name": "a", "until": 0.5, "levels": [1, 2], "rates": {"1": 0.1}},
        {"name": "b", "until": 1.0, "levels": [1, 2]},
    )
    curriculum = Curriculum(run(widths=(7, 3), l0=(2, 1), curriculum=stages), 10)
    assert [curriculum.at(step).stage.name for step in (0, 4, 5, 9)] == ["a", "a", "b", "b"]
    assert curriculum.at(0).stage.rates == {1: 0.1}


def test_a_stage_can_warm_a_level_up_again():
    stages = (
        {"name": "a", "until": 0.5, "levels": [2]},
        {"name": "b", "until": 0.7, "levels": [1, 2]},
        {"name": "c", "until": 1.0, "levels": [1, 2], "warmup": [2]},
    )
    curriculum = Curriculum(run(widths=(7, 3), l0=(2, 1), curriculum=stages), 10)
    assert [curriculum.at(step).warmup_starts.get(2) for step in (0, 5, 6, 7, 9)] == [0, 0, 0, 7, 7]
    assert [curriculum.at(step).warmup_starts.get(1) for step in (0, 5, 9)] == [None, 5, 5]
    assert [step for step in range(10) if curriculum.at(step).starts] == [0, 5, 7]
