"""The command line of the models, and the list of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from types import ModuleType

from tests.model import bell, forks, publication, rules, slot
from tests.model.explore import Result, explore, follow

__all__ = ["MODELS", "main", "model_of_rule"]

MODELS: dict[str, ModuleType] = {
    "references": rules,
    "messages": forks,
    "publication": publication,
    "slot": slot,
    "bell": bell,
}
"""Each model's module: RULES, SCENARIOS, SHOWN_BY, build(scenario, without) and describe(action, state)."""


def model_of_rule(rule: str) -> str:
    """Return the name of the model that has a rule; no two have one of the same name."""
    (name,) = [name for name, module in MODELS.items() if rule in module.RULES]
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Search as the command line says and print what was found.

    Returns
    -------
    int
        0 when everything turned out as it must: no problem with all rules
        in force, a counterexample without one.
    """
    options = _parser().parse_args(arguments)
    if options.list:
        _list()
        return 0
    if options.faults:
        shown = [_show_fault(rule, options.scenario) for rule in _all_rules()]
        return int(not all(shown))
    if options.fault:
        return int(not _show_fault(options.fault, options.scenario, with_trace=True))
    found = [
        _search(name, scenario)
        for name, module in MODELS.items()
        for scenario in module.SCENARIOS
        if options.scenario in (None, scenario)
    ]
    return int(any(result.problem for result in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description="Search every state of the models.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fault", choices=_all_rules(), metavar="NAME", help="leave one rule out: show what goes wrong")
    what.add_argument("--faults", action="store_true", help="leave every rule out once")
    what.add_argument("--list", action="store_true", help="name the rules and the scenarios")
    scenarios = [scenario for module in MODELS.values() for scenario in module.SCENARIOS]
    parser.add_argument("--scenario", choices=scenarios, metavar="NAME", help="this scenario only")
    return parser


def _all_rules() -> list[str]:
    return [rule for module in MODELS.values() for rule in module.RULES]


def _list() -> None:
    for name, module in MODELS.items():
        print(f"{name}: rules")
        for rule, sentence in module.RULES.items():
            print(f"    {rule:<28}{sentence}")
        print(f"{name}: scenarios")
        for scenario in module.SCENARIOS:
            print(f"    {scenario}")


def _search(name: str, scenario: str) -> Result:
    module, began = MODELS[name], time.monotonic()
    model = module.build(scenario)
    result = explore(model)
    verdict = result.problem or "holds"
    spent_s = time.monotonic() - began
    print(f"{name:<12}{scenario:<38}{result.states:>8} states, {result.finals:>4} ends {spent_s:6.1f} s  {verdict}")
    if result.problem:
        _print_trace(module, model, result)
    return result


def _show_fault(rule: str, scenario: str | None, *, with_trace: bool = False) -> bool:
    module = MODELS[model_of_rule(rule)]
    if scenario not in module.SCENARIOS:
        scenario = module.SHOWN_BY[rule]
    model = module.build(scenario, (rule,))
    result = explore(model)
    found = f"{result.problem} ({len(result.trace)} steps)" if result.problem else "NOTHING GOES WRONG"
    print(f"without {rule:<28}{scenario}: {found}")
    if with_trace:
        _print_trace(module, model, result)
    return result.problem is not None


def _print_trace(module: ModuleType, model: object, result: Result) -> None:
    for number, (action, state) in enumerate(zip(result.trace, follow(model, result.trace)[1:], strict=True), 1):
        print(f"{number:>4} {module.describe(action, state)}")
