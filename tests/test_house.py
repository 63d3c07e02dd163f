"""The rules of the house, read from the syntax trees: kept by this test, not by memory."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
CORE = "execution_envelope"

#: A module may import only from those before it; a name stands for the module or for everything in the folder.
ORDER = """
version errors credentials resources values envelope document lifecycle delta reckoning record tree bounds decision
process mailbox threads answers isolation hooks grant budgets approvals reviewer criteria query ledger reconciliation
observers counters family journal above reporting reconciler judge admission block attempted observed approver
reviewing blocking controller facets policy telemetry adapters integrations words sentences review presentation
console simulation cli_shared cli_admission cli_explain cli_proof cli_projection cli_list cli_relay cli_replay
cli_review cli_serve cli_simulate cli_totals cli_upkeep cli testing
"""
LEDGER_ORDER = """
merkle chain rollups projection projection_session search schema exports commit balances submission contract writer
wire spool sqlite_database sqlite_segments sqlite_store rollup_store projection_store projector projection_sqlite memory
sqlite postgres_database postgres_segments postgres_store projection_postgres postgres sums recomputation workers
verification checkpoint proof segment_file segments remote_http remote_segments projection_remote remote_store remote
"""
#: What only some deciders, adapters or commands need: the core does without.
OPTIONAL = {
    "facets",
    "adapters",
    "integrations",
    "policy",
    "telemetry",
    "console",
    "presentation",
    "review",
    "simulation",
    "cli",
    "cli_shared",
    "cli_admission",
    "cli_list",
    "cli_explain",
    "cli_proof",
    "cli_projection",
    "cli_relay",
    "cli_replay",
    "cli_review",
    "cli_serve",
    "cli_simulate",
    "cli_totals",
    "cli_upkeep",
    "testing",
}
CORE_MAY_IMPORT = {"msgspec", "anyio", "uuid_utils"}
#: What comes with an extra, and the modules of the core that import it.
EXTRA = {
    "execution_envelope.ledger.checkpoint": {"cryptography"},
    **{
        f"execution_envelope.ledger.{module}": {"psycopg"}
        for module in ("postgres", "postgres_database", "postgres_store", "projection_postgres")
    },
    "execution_envelope.ledger.segment_file": {"pyarrow"},
    "execution_envelope.ledger.remote_http": {"httpx"},
}
PUBLIC = tuple(
    f"execution_envelope.{module}"
    for module in (
        *("integrations", "adapters", "reconciliation", "reviewer", "policy", "telemetry", "budgets"),
        *("console", "review"),
    )
)
MAX_LINES = 600

FILES = sorted(SOURCE.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in the file, with the names taken from it where those are modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            module = node.module or ""
            for alias in node.names:
                target = SOURCE.joinpath(*module.split("."), alias.name)
                is_module = target.with_suffix(".py").exists() or target.is_dir()
                yield f"{module}.{alias.name}" if is_module else module


def place(module: str) -> int:
    """Where a module of the core stands in the order; the package itself comes last but for what is built upon it."""
    parts = module.split(".")
    order = ORDER.split()
    if len(parts) == 1:
        return order.index("adapters") * 100
    assert parts[1] in order, f"{module}: expected a module that has its place in the order, see ORDER in {__file__}"
    inner = LEDGER_ORDER.split()
    return order.index(parts[1]) * 100 + (inner.index(parts[2]) if parts[1:2] == ["ledger"] and len(parts) > 2 else 99)


CORE_FILES = [path for path in FILES if dotted(path).split(".")[0] == CORE]
PROVING_FILES = [path for path in FILES if dotted(path).split(".")[0] != CORE]


@pytest.mark.parametrize("path", CORE_FILES, ids=dotted)
def test_imports_run_one_way(path: Path) -> None:
    me = dotted(path)
    for module in imports(path):
        if module.split(".")[0] != CORE or module == me:
            continue
        same_folder = me.split(".")[:2] == module.split(".")[:2] and place(me) == place(module)
        within = module.startswith(f"{me}.") or me.startswith(f"{module}.")
        if me == CORE:
            assert place(module) < place(me), f"{me} imports {module}"
        else:
            assert place(module) < place(me) or same_folder or within, f"{me} imports {module}, which comes later"


def test_no_modules_import_each_other() -> None:
    edges = {
        dotted(path): {m for m in imports(path) if m.startswith(CORE) and m != dotted(path)} for path in CORE_FILES
    }
    done: set[str] = set()
    while ready := {module for module, needs in edges.items() if module not in done and needs & edges.keys() <= done}:
        done |= ready
    assert edges.keys() - done == set()


@pytest.mark.parametrize("path", CORE_FILES, ids=dotted)
def test_the_core_needs_three_packages(path: Path) -> None:
    parts = dotted(path).split(".")
    if len(parts) > 1 and parts[1] in OPTIONAL:
        assert parts[1] in ORDER.split()
        return
    others = {module.split(".")[0] for module in imports(path)} - {CORE} - sys.stdlib_module_names
    assert others <= CORE_MAY_IMPORT | EXTRA.get(dotted(path), set())


@pytest.mark.parametrize("path", PROVING_FILES, ids=dotted)
def test_the_proving_ground_uses_only_what_is_public(path: Path) -> None:
    for module in imports(path):
        if module.split(".")[0] == CORE:
            assert module == CORE or module.startswith(PUBLIC), f"{dotted(path)} imports {module}"


def test_nothing_but_the_proving_ground_stands_beside_the_core() -> None:
    assert {dotted(path).split(".")[0] for path in FILES} <= {CORE, "proving_ground"}
    assert not any(module.startswith("proving_ground") for path in CORE_FILES for module in imports(path))


IMPORT = """
    import sys

    seen = []

    def watch(event, arguments):
        if event.startswith(("socket.", "subprocess.", "sqlite3.")) or event in ("os.remove", "os.mkdir", "os.rename"):
            seen.append((event, arguments))
        if event == "open" and isinstance(arguments[0], str):
            path, mode = arguments[0], str(arguments[1] or "")
            # What the interpreter itself reads of modules and packages is not the package's own doing.
            if not path.endswith((".py", ".pyc", ".so")) or set(mode) & set("wax+"):
                seen.append((event, path, mode))

    sys.dont_write_bytecode = True
    import anyio, msgspec, uuid_utils, sqlite3, importlib.resources, anyio.to_thread, anyio.from_thread
    sys.addaudithook(watch)
    import execution_envelope
    execution_envelope.AdmissionController
    print(seen)
"""


def test_importing_reads_and_opens_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(SOURCE)},
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def undocumented(path: Path) -> Iterator[str]:
    """Public modules, classes, functions and methods that say nothing of themselves.

    Three sorts need no words: a property and a method of one statement (its name and type say it), a method of a class
    whose own docstring points to the contract that documents it (``See `Ledger`.``), and stubs of a protocol or of an
    overload.
    """
    tree = ast.parse(path.read_text())
    if ast.get_docstring(tree) is None and tree.body:
        yield dotted(path)
    yield from _undocumented(tree, dotted(path))


def _undocumented(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        if any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in child.decorator_list):
            continue
        if ast.get_docstring(child) is None and not (isinstance(node, ast.ClassDef) and needs_none(child, node)):
            yield f"{name}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from _undocumented(child, f"{name}.{child.name}")


def needs_none(method: ast.stmt, owner: ast.ClassDef) -> bool:
    if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    inherited = "See `" in (ast.get_docstring(owner) or "") or any(
        isinstance(base, ast.Name) and base.id in ("Ledger", "Protocol") for base in owner.bases
    )
    tests = method.name.startswith("test_")
    return inherited or tests or len(method.body) == 1


@pytest.mark.parametrize("path", CORE_FILES, ids=dotted)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    assert list(undocumented(path)) == []


def test_every_module_of_the_order_is_there_or_planned() -> None:
    there = {dotted(path).split(".")[1] for path in CORE_FILES if "." in dotted(path)}
    assert there <= set(ORDER.split())
    assert set(ORDER.split()) - there <= {"review"}
