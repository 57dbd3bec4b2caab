"""Stubs, ``__all__`` and the API page say what the modules hold at run time."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
API_PAGE = ROOT / "docs" / "api.md"


def module_name(source: Path) -> str:
    """Name the module that a file below the root holds."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


COMPILED = sorted((ROOT / "fastref").rglob("*.pyx"))
# What Python runs by itself when it starts exports nothing, and would put fastref in torch's place for all later tests.
MODULES = sorted(
    module_name(p)
    for p in (ROOT / "fastref").rglob("*")
    if p.suffix in {".py", ".pyx"} and p.name != "sitecustomize.py"
)

# What Cython allows around a parameter's name and Python does not. A pointer cannot be an argument: stars are Python's.
C_TYPE = re.compile(r"^(?:[\w.]+(?:\[[^\]]*\])?\s+)+(?=\w)")
NONE_CHECK = re.compile(r"\s+(?:not|or)\s+None\b")


@dataclass(frozen=True)
class Parameter:
    """One parameter, as far as a caller can tell: its name, how it may be passed, and its default as source."""

    name: str
    kind: str
    default: str | None


def parameters_of_stub(arguments: ast.arguments) -> list[Parameter]:
    """Return the parameters of a function in a stub."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = []
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = "POSITIONAL_ONLY" if number < len(arguments.posonlyargs) else "POSITIONAL_OR_KEYWORD"
        found.append(Parameter(argument.arg, kind, default and ast.unparse(default)))
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, "VAR_POSITIONAL", None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(argument.arg, "KEYWORD_ONLY", default and ast.unparse(default)))
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, "VAR_KEYWORD", None))
    return found


def agree(stub: list[Parameter], real: list[Parameter]) -> bool:
    """Tell whether a stub's parameters are the real ones; a default of ``...`` stands for any."""
    return len(stub) == len(real) and all(
        s == r or (s.name, s.kind, s.default) == (r.name, r.kind, "...") and r.default is not None
        for s, r in zip(stub, real, strict=True)
    )


def parameters_at_run_time(function: object) -> list[Parameter]:
    """Return the parameters of a compiled function, as ``inspect`` sees them."""
    return [
        Parameter(p.name, p.kind.name, None if p.default is p.empty else repr(p.default))
        for p in inspect.signature(function).parameters.values()
    ]


def constructor_in_source(source: str, name: str) -> list[Parameter] | None:
    """Return the parameters of an extension type's constructor, or None if it has none.

    Python has no signature for these, so they are read from the source, rid of their C types.
    """
    body = re.search(rf"^cdef class {name}\b.*?:\n(?P<body>(?:(?:[ \t].*)?\n)*)", source, re.M)
    assert body, f"no `cdef class {name}` in the source"
    heads = [
        re.search(rf"def {constructor}\s*\((?P<list>.*?)\)\s*(?:->.*?)?:\s*$", body["body"], re.M | re.S)
        for constructor in ("__init__", "__cinit__")  # of two, the second takes whatever the first does
    ]
    head = heads[0] or heads[1]
    if head is None:
        return None
    text = re.sub(r"#[^\n]*", "", head["list"])
    try:
        definition = ast.parse(f"def __init__({text}): ...").body[0]
    except SyntaxError:
        parts = NONE_CHECK.sub("", text).split(",")
        plain = [C_TYPE.sub("", part.strip()) for part in parts if part.strip()]
        definition = ast.parse(f"def __init__({', '.join(plain)}): ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return parameters_of_stub(definition.args)


def public_names(module: ModuleType) -> set[str]:
    """Return ``__all__``, or what the module defines itself and does not hide."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", module.__name__) == module.__name__
    }


def stub_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Map the public names that a stub's module or class defines to their definitions."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Assign):
            found.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return {name: node for name, node in found.items() if not name.startswith("_")}


def is_decorated(node: ast.stmt, decorator: str) -> bool:
    """Tell whether a definition has this decorator."""
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == decorator for d in node.decorator_list)


def is_attribute(node: ast.stmt) -> bool:
    """Tell whether a stub's member is read without a call."""
    return isinstance(node, ast.AnnAssign | ast.Assign) or is_decorated(node, "property")


def differences_of_function(name: str, node: ast.FunctionDef, function: object) -> list[str]:
    """Say how a function's stub differs from the function."""
    if is_decorated(node, "overload"):  # several signatures where one function takes them all
        return []
    stub, real = parameters_of_stub(node.args), parameters_at_run_time(function)
    if is_decorated(node, "classmethod"):
        stub = stub[1:]
    return [] if agree(stub, real) else [f"{name}: stub {stub}, at run time {real}"]


def differences_of_class(name: str, node: ast.ClassDef, kind: type, source: str) -> list[str]:
    """Say how a class's stub differs from the class."""
    in_stub = stub_names(node.body)
    real = {member: value for member, value in vars(kind).items() if not member.startswith("_")}
    found = [f"{name}.{member}: not in the stub" for member in real.keys() - in_stub.keys()]
    found += [f"{name}.{member}: only in the stub" for member in in_stub.keys() - real.keys()]
    for member in real.keys() & in_stub.keys():
        value, definition = getattr(kind, member), in_stub[member]
        if callable(value) == is_attribute(definition):
            found.append(f"{name}.{member}: a method on one side, an attribute on the other")
        elif callable(value) and isinstance(definition, ast.FunctionDef):
            found += differences_of_function(f"{name}.{member}", definition, value)
    is_extension_type = re.search(rf"^cdef class {name}\b", source, re.M)
    stub_constructors = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in {"__init__", "__new__"}]
    if is_extension_type and not any(is_decorated(n, "overload") for n in stub_constructors):
        written = constructor_in_source(source, name)
        stubbed = parameters_of_stub(stub_constructors[0].args) if stub_constructors else None
        if not agree((stubbed or [])[1:], (written or [])[1:]):  # what comes after self
            found.append(f"{name}(): stub {stubbed}, in the source {written}")
    return found


def differences(stub: ast.Module, module: ModuleType, source: str) -> list[str]:
    """Say how a stub differs from its module; ``source`` is the module's Cython text."""
    in_stub, real = stub_names(stub.body), public_names(module)
    found = [f"{name}: not in the stub" for name in real - in_stub.keys()]
    found += [f"{name}: only in the stub" for name in in_stub.keys() - real]
    for name in real & in_stub.keys():
        node, value = in_stub[name], getattr(module, name)
        if isinstance(node, ast.ClassDef) and inspect.isclass(value):
            found += differences_of_class(name, node, value, source)
        elif isinstance(node, ast.FunctionDef) and callable(value):
            found += differences_of_function(name, node, value)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.append(f"{name}: a {type(value).__name__} at run time")
    return sorted(found)


@pytest.mark.parametrize("source", COMPILED, ids=module_name)
def test_the_stub_of_a_compiled_module_says_what_it_holds(source: Path) -> None:
    stub = source.with_suffix(".pyi")
    assert stub.exists(), f"{module_name(source)} has no stub"
    module = importlib.import_module(module_name(source))
    assert not differences(ast.parse(stub.read_text()), module, source.read_text())


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists_once(name: str) -> None:
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))
    assert [n for n in exported if not hasattr(module, n)] == []
    assert len(exported) == len(set(exported))


@pytest.mark.parametrize("name", ["fastref", "fastref.rpc"])
def test_the_api_page_has_every_public_name(name: str) -> None:
    module = importlib.import_module(name)
    page = API_PAGE.read_text()
    # A whole module that is documented automatically shows the names that have a docstring.
    automatic = re.search(rf"automodule::? *\}}?\s*{re.escape(name)}\s*\n(?:\s*:.*\n)*?\s*:members:", page)
    missing = [
        public
        for public in module.__all__
        if not re.search(rf"(?<![\w-]){re.escape(public)}\b", page)
        and not (automatic and inspect.getdoc(getattr(module, public)))
    ]
    assert not missing


class TestTheComparisonItself:
    """It compares real stubs above; here it is shown to find what it is there to find."""

    SOURCE = "cdef class Counter:\n    def __cinit__(self, uint64_t first, *, bint wide=False):\n        pass\n"

    @pytest.mark.parametrize(
        ("parameters", "plain"),
        [
            ("self, first: int, names: dict[str, int], wide: bool = False", "self, first, names, wide = False"),
            ("self, uint64_t first, *, bint wide=False", "self, first, *, wide=False"),
            ("self, double[:] view not None, unsigned int first=1", "self, view, first=1"),
            ("self,  # me\n        Table table not None,\n        last=None,\n    ", "self, table, last=None"),
        ],
    )
    def test_a_constructor_is_read_without_its_types(self, parameters: str, plain: str) -> None:
        source = f"cdef class A:\n    cdef int x\n\n    def __init__({parameters}) -> None:\n        pass\n"
        expected = ast.parse(f"def f({plain}): ...").body[0]
        assert isinstance(expected, ast.FunctionDef)
        assert constructor_in_source(source, "A") == parameters_of_stub(expected.args)

    def compare(self, stub: str) -> list[str]:
        module = ModuleType("counting")

        class Counter:
            limit = property(lambda self: 1)

            def next(self, step=1):
                return step

        Counter.__module__ = "counting"
        module.Counter, module.LIMIT = Counter, 3
        return differences(ast.parse(stub), module, self.SOURCE)

    GOOD = (
        "LIMIT: int\n"
        "class Counter:\n"
        "    @property\n"
        "    def limit(self) -> int: ...\n"
        "    def __init__(self, first: int, *, wide: bool = ...) -> None: ...\n"
        "    def next(self, step: int = 1) -> int: ...\n"
    )

    def test_equal_is_equal(self) -> None:
        assert self.compare(self.GOOD) == []

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("LIMIT: int\n", ""),
            ("LIMIT: int\n", "LIMIT: int\nOTHER: int\n"),
            ("LIMIT: int\n", "def LIMIT() -> int: ...\n"),
            ("step: int = 1", "step: int = 2"),
            ("step: int = 1", "step: int"),
            ("step: int = 1", "step: int = 1, more: int = 1"),
            ("step: int = 1", "*, step: int = 1"),
            ("    @property\n", ""),
            ("next(", "following("),
            ("first: int, *,", "first: int,"),
            ("wide: bool = ...", "wide: bool"),
        ],
    )
    def test_a_difference_is_found(self, old: str, new: str) -> None:
        assert old in self.GOOD
        assert self.compare(self.GOOD.replace(old, new))
