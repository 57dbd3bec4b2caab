"""The models hold with all their rules, and go wrong without any one of them."""

from __future__ import annotations

import pytest

from tests.model.bell import BellModel
from tests.model.command import MODELS, main, model_of_rule
from tests.model.explore import explore, follow

LARGE = {
    *(
        (name, scenario)
        for name in ("references", "messages", "publication")
        for scenario in MODELS[name].SCENARIOS
        if scenario not in MODELS[name].QUICK
    ),
    ("bell", "a producer dies"),
    ("bell", "a favourite of two"),
    ("bell", "delayed stores, two producers"),
}
EVERYTHING = [(name, scenario) for name, module in MODELS.items() for scenario in module.SCENARIOS]
RULES = [rule for module in MODELS.values() for rule in module.RULES]


def check(name: str, scenario: str) -> None:
    result = explore(MODELS[name].build(scenario))
    assert result.problem is None, result.trace
    assert result.finals > 0, "a model in which nothing ever ends proves nothing"


@pytest.mark.parametrize(("name", "scenario"), [each for each in EVERYTHING if each not in LARGE])
def test_nothing_held_is_destroyed_and_nothing_is_left_over(name: str, scenario: str) -> None:
    check(name, scenario)


@pytest.mark.slow
@pytest.mark.gates
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "scenario"), sorted(LARGE))
def test_the_large_scenarios_hold_too(name: str, scenario: str) -> None:
    check(name, scenario)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_needed(rule: str) -> None:
    module = MODELS[model_of_rule(rule)]
    model = module.build(module.SHOWN_BY[rule], (rule,))
    result = explore(model)
    assert result.problem is not None, f"nothing goes wrong without {rule}"
    last = follow(model, result.trace)[-1]
    if "round for ever" not in result.problem:
        assert result.problem in (model.violation(last), model.unfinished(last))


@pytest.mark.parametrize("rule", RULES)
def test_a_counterexample_ends_with_the_rule_in_force(rule: str) -> None:
    """The last step that goes wrong is one the rules forbid, or lead out of."""
    module = MODELS[model_of_rule(rule)]
    faulty = module.build(module.SHOWN_BY[rule], (rule,))
    sound = module.build(module.SHOWN_BY[rule])
    state = sound.initial()
    for action in explore(faulty).trace:
        if action not in list(sound.enabled(state)):
            return
        state = sound.apply(state, action)
        assert sound.violation(state) is None
    assert any(not sound.outside(action) for action in sound.enabled(state)) or sound.unfinished(state) is None


def test_no_two_models_have_a_rule_or_a_scenario_of_the_same_name() -> None:
    names = [name for module in MODELS.values() for name in (*module.RULES, *module.SCENARIOS)]
    assert len(names) == len(set(names))


def test_a_model_refuses_to_leave_out_a_rule_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="no such rule: fence"):
        BellModel(("fence",))


def test_the_command_shows_a_counterexample(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fault", "sender_pin"]) == 0
    shown = capsys.readouterr().out
    assert "was destroyed or reused" in shown
    assert "compare-and-swap of entry 0 from zero to CLOSED" in shown


def test_the_command_reports_what_it_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scenario", "index reused"]) == 0
    assert "index reused" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert "sender_pin" in capsys.readouterr().out
