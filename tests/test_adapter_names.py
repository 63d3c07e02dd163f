"""Adapters by name: ours as the package declares them, and those of other packages."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from execution_envelope import InvalidField, adapters
from execution_envelope.adapters import Context

ROOT = Path(__file__).parent.parent
NAMED: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][adapters.GROUP]


def install(folder: Path, package: str, *points: str) -> None:
    """A package as an installer leaves it: its metadata, with entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join((f"[{adapters.GROUP}]", *points)))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with this package as it declares itself, and two others."""
    install(tmp_path, "execution_envelope", *(f"{name} = {place}" for name, place in NAMED.items()))
    (tmp_path / "example_admission.py").write_text(
        "def describe_job(body, context):\n    raise NotImplementedError\n\nNOT_ONE = 5\n"
    )
    (tmp_path / "example_broken.py").write_text("raise RuntimeError('no licence')\n")
    install(
        tmp_path,
        "example",
        "example.job = example_admission:describe_job",
        "example.number = example_admission:NOT_ONE",
        "example.gone = example_admission:gone",
        "example.broken = example_broken:describe_job",
        "example.twice = example_admission:describe_job",
    )
    install(tmp_path, "other", "example.twice = other_admission:describe_job")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_all_are_there_by_name(installed: Path) -> None:
    names = adapters.available()
    assert set(NAMED) | {"example.job", "example.twice"} <= set(names)
    assert names == sorted(set(names))
    assert adapters.load("example.job").__module__ == "example_admission"


@pytest.mark.parametrize("name", NAMED)
def test_ours_are_what_the_package_declares(name: str, installed: Path) -> None:
    module, _, attribute = NAMED[name].partition(":")
    assert adapters.load(name) is getattr(sys.modules[module], attribute)
    assert name.partition(".")[0] == module.rpartition(".")[2]


def test_every_adapter_of_ours_has_a_name() -> None:
    modules = [f"execution_envelope.adapters.{path.stem}" for path in Path(adapters.__file__).parent.glob("[a-z]*.py")]
    found = {f"{m}:{n}" for m in modules for n in vars(importlib.import_module(m)) if n.startswith("describe_")}
    assert found == set(NAMED.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", r"expected one of example\.broken, .*openai\.batch.*, got `nobody` - at `adapter`"),
        (5, "expected the name of an adapter, got `int` - at `adapter`"),
        ("example.number", r"expected a callable in `example_admission:NOT_ONE`, got `int` - at `adapter`"),
        ("example.gone", r"expected `example.gone` to be found in `example_admission:gone`, got AttributeError: "),
        ("example.broken", r"in `example_broken:describe_job`, got RuntimeError: no licence - at `adapter`"),
        ("example.twice", r"expected one place for `example.twice`, got `example_admission:describe_job`, `other_"),
    ],
)
def test_what_cannot_be_loaded_is_told(name: str, message: str, installed: Path) -> None:
    with pytest.raises(InvalidField, match=message):
        adapters.load(name)


def test_a_loaded_one_describes(installed: Path) -> None:
    ask = adapters.load("ray.job")({"entrypoint": "python train.py"}, Context("POST /api/jobs/", {}, {}, {}, None))
    assert (ask.kind, ask.target.id) == ("agent.run", "unnamed")
