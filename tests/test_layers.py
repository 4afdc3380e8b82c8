"""The rules about imports that keep the parts apart, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = (
    ("types", "errors", "clock", "rundir", "user_code"),
    ("client",),
    ("config",),
    ("store",),
    ("algorithms",),
    ("rewards", "data"),
    ("engines",),
    ("workers",),
    ("placement",),
    ("plan",),
    ("pipeline",),
    ("runtime",),
    ("report",),
    ("launch",),
    ("doctor",),
    ("api",),
    ("cli",),
)
"""A part imports from itself and from parts in lines above its own."""

RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

HEAVY_AT_IMPORT = ("torch", "transformers", "vllm", "deepspeed", "ray", "matplotlib")
TORCH_LIVES_IN = ("algorithms", "engines", "workers")
LIVES_IN = {
    "vllm": {
        "asyncflow/engines/vllm.py",
        "asyncflow/engines/weights/vllm_plugin.py",
        "asyncflow/engines/weights/vllm_transfer.py",
    },
    "deepspeed": {"asyncflow/engines/deepspeed.py"},
    "ray": {"asyncflow/runtime/ray.py"},
}
"""The only files that import these packages, at any level."""

UNSAFE = ("pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "copyreg")


RUNS_CODE = ("importlib", "runpy", "code", "codeop", "imp", "pkgutil")
RUNS_CODE_CALLS = ("eval", "exec", "compile", "__import__", "np.load", "numpy.load", "torch.load", "yaml.load")
"""In the store: names of functions that make objects of any class, or code, from bytes or names."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import in a source file."""

    file: str
    part: str
    """First name below `asyncflow`, `api` for the service, or `` for the package itself."""
    module: str
    """Full name of what is imported."""
    line: int
    when: str
    """`load` (with the file), `call` (inside a function) or `types` (for the type checker only)."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"

    @property
    def target(self) -> str | None:
        """The part of this project that is imported."""
        names = self.module.split(".")
        if names[0] == "asyncflow_api":
            return "api"
        return names[1] if names[0] == "asyncflow" and len(names) > 1 else None

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def sources() -> list[Path]:
    return sorted(path for folder in ("asyncflow", "api") for path in (ROOT / folder).rglob("*.py"))


def imports_of(source: str, file: str) -> Iterator[Import]:
    names = Path(file).with_suffix("").parts
    part = "api" if names[0] == "api" else "" if names[1] == "__init__" else names[1]
    package = ["asyncflow_api" if names[0] == "api" else "asyncflow", *names[1:-1]]

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = when
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner = "call"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inner = "types"
            if isinstance(child, ast.Import | ast.ImportFrom):
                for module in modules(child):
                    yield Import(file=file, part=part, module=module, line=child.lineno, when=when)
            yield from walk(child, inner)

    def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names] if base == "asyncflow" else [base]

    yield from walk(ast.parse(source), "load")


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [found for path in sources() for found in imports_of(path.read_text("utf-8"), str(path.relative_to(ROOT)))]


def test_the_reader_of_imports_sees_all_of_them() -> None:
    source = (
        "from __future__ import annotations\nimport torch.nn\nfrom asyncflow import plan\nfrom . import base\n"
        "from ..store import table\nif TYPE_CHECKING:\n    import ray\n"
        "class A:\n    import vllm\n    def f(self):\n        from asyncflow_api.app import create_app\n"
        "try:\n    import pickle\nexcept ImportError:\n    pass\n"
    )

    found = [(one.module, one.target, one.when) for one in imports_of(source, "asyncflow/engines/new.py")]

    assert found == [
        ("__future__", None, "load"),
        ("torch.nn", None, "load"),
        ("asyncflow.plan", "plan", "load"),
        ("asyncflow.engines", "engines", "load"),
        ("asyncflow.store", "store", "load"),
        ("ray", None, "types"),
        ("vllm", None, "load"),
        ("asyncflow_api.app", "api", "call"),
        ("pickle", None, "load"),
    ]


def test_every_part_has_a_layer() -> None:
    parts = {
        path.stem for path in (ROOT / "asyncflow").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }

    assert parts - {"__init__"} <= RANK.keys()


def test_each_part_imports_only_from_layers_before_its_own(imports: list[Import]) -> None:
    wrong = [
        str(one)
        for one in imports
        # The package's own file names the public interface, which is everywhere, and loads it on demand.
        if one.part and one.target and one.target != one.part and RANK[one.target] >= RANK[one.part]
    ]

    assert not wrong


def test_importing_the_package_imports_no_part_of_it(imports: list[Import]) -> None:
    assert not [str(one) for one in imports if not one.part and one.target and one.when == "load"]


def test_only_the_command_line_knows_the_service(imports: list[Import]) -> None:
    assert not [str(one) for one in imports if one.target == "api" and one.part not in ("api", "cli")]


def test_torch_is_loaded_only_by_parts_that_hold_tensors(imports: list[Import]) -> None:
    assert not [
        str(one) for one in imports if one.package == "torch" and one.when == "load" and one.part not in TORCH_LIVES_IN
    ]


@pytest.mark.parametrize("package", LIVES_IN)
def test_an_engine_package_is_known_in_as_few_files_as_possible(imports: list[Import], package: str) -> None:
    assert not [str(one) for one in imports if one.package == package and one.file not in LIVES_IN[package]]


def test_nothing_is_ever_pickled(imports: list[Import]) -> None:
    wrong = [str(one) for one in imports if one.package in UNSAFE]
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            unsafe_numpy = any(option.arg == "allow_pickle" for option in node.keywords)
            if called in ("torch.load", "torch.save") or called.endswith(".read_pickle") or unsafe_numpy:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {called}")

    assert not wrong


def test_the_store_runs_nothing_that_it_reads(imports: list[Import]) -> None:
    """Neither the store nor anything of this package that it imports has a way from bytes to code."""
    parts = {"store"}
    while more := {one.target for one in imports if one.part in parts and one.target} - parts:
        parts |= more
    files = {one.file for one in imports if one.part in parts}
    assert "asyncflow/store/wire.py" in files
    wrong = [str(one) for one in imports if one.file in files and one.package in (*UNSAFE, *RUNS_CODE)]
    for file in sorted(files):
        wrong += [
            f"{file}:{line} calls {called}" for line, called in calls_that_run_code((ROOT / file).read_text("utf-8"))
        ]

    assert not wrong


def calls_that_run_code(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in RUNS_CODE_CALLS or called.split(".")[-1] in ("deserialize", "register_extension_type"):
                yield node.lineno, called


def test_calls_that_run_code_are_seen() -> None:
    source = "eval(x)\nexec('y')\nm = __import__('os')\npa.deserialize(b)\nnp.load(f)\nyaml.load(f)\nre.compile('x')\n"

    assert [called for _, called in calls_that_run_code(source)] == [
        "eval",
        "exec",
        "__import__",
        "pa.deserialize",
        "np.load",
        "yaml.load",
    ]


@pytest.mark.parametrize("module", ["asyncflow", "asyncflow.cli.main"])
def test_importing_the_front_door_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*(name for name in {HEAVY_AT_IMPORT!r} if name in sys.modules))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# -- one mutator -------------------------------------------------------------------------------------------------------

ONLY_LOOK = ("views", "needs", "choice", "table")
"""Files of the table that decide and change nothing; `state.py` has the one mutator."""
CHANGERS = (
    "put",
    "pop",
    "popitem",
    "clear",
    "update",
    "setdefault",
    "add",
    "append",
    "extend",
    "insert",
    "remove",
    "sort",
)
LINE = ("state", "views", "needs", "choice", "image", "table")
"""Each imports only from those before it."""


def changes(node: ast.AST) -> Iterator[str]:
    """What is assigned to an attribute, or to a part of one, or changed by a call on one."""
    targets: list[ast.expr] = []
    match node:
        case ast.Assign(targets=found):
            targets = list(found)
        case ast.AugAssign(target=found) | ast.AnnAssign(target=found):
            targets = [found]
        case ast.Delete(targets=found):
            targets = list(found)
        case ast.Call(func=ast.Attribute(value=ast.Attribute() | ast.Subscript() as whose, attr=name)):
            targets = [whose] if name in CHANGERS else []
    for target in (part for whole in targets for part in (whole.elts if isinstance(whole, ast.Tuple) else [whole])):
        inner = target
        while isinstance(inner, ast.Subscript):
            inner = inner.value
        if isinstance(inner, ast.Attribute):
            yield ast.unparse(target)


@pytest.mark.parametrize("name", ONLY_LOOK)
def test_nothing_but_the_mutator_changes_the_table(name: str) -> None:
    tree = ast.parse((ROOT / f"asyncflow/store/{name}.py").read_text(encoding="utf-8"))

    assert [change for node in ast.walk(tree) for change in changes(node)] == []


@pytest.mark.parametrize(
    "line",
    [
        "self.x = 1",
        "self.rows.tokens[i] += 1",
        "rows.x[i][j] = 1",
        "a, self.x = 1, 2",
        "del self.x[1]",
        "self.x.put(1)",
    ],
)
def test_every_way_to_change_it_is_seen(line: str) -> None:
    assert len([change for node in ast.walk(ast.parse(line)) for change in changes(node)]) == 1


def test_the_files_of_the_table_stand_in_a_straight_line() -> None:
    for place, name in enumerate(LINE):
        tree = ast.parse((ROOT / f"asyncflow/store/{name}.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        later = {f"asyncflow.store.{other}" for other in LINE[place:]}
        assert not modules & later, name
