"""The routes that show the catalogue: models, their files, their configurations."""

from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from proving_ground.auth import CurrentCaller
from proving_ground.catalog import ENGINE, SINCE, CatalogModel
from proving_ground.state import BackendState

router = APIRouter(tags=["catalogue"])


class ModelFileOut(BaseModel):
    """One file of weights; `size` in bytes."""

    id: UUID
    model_id: UUID
    name: str
    size: int | None
    storage_type: str = "file"
    checksum: str
    checksum_type: str = "sha256"
    created_timestamp: datetime = SINCE

    model_config = ConfigDict(protected_namespaces=())


class ModelOut(BaseModel):
    """One model; `m_files` is filled when asked for."""

    id: UUID
    name: str
    repo_modelId: str  # noqa: N815 - the name on the wire
    purpose: str = "chat"
    source_repository: str
    m_files: list[ModelFileOut]
    created_timestamp: datetime = SINCE


class ModelConfigOut(BaseModel):
    """One configuration of a model."""

    id: UUID
    m_id: UUID
    m_file_id: UUID
    name: str = "default"
    default: bool = True
    config: dict[str, Any] = Field(default_factory=dict)
    system_config: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime = SINCE


@router.get("/models/")
async def list_models(caller: CurrentCaller, backend: BackendState, load_files: bool = False) -> list[ModelOut]:
    """Every model that can be deployed."""
    return [_model(model, load_files) for model in backend.catalog.models()]


@router.get("/models/{model_id}")
async def get_model(model_id: UUID, caller: CurrentCaller, backend: BackendState) -> ModelOut:
    """One model with its files."""
    return _model(_found(backend.catalog.model(model_id), f"no model `{model_id}`"), load_files=True)


@router.get("/model_configs/")
async def list_configs(
    caller: CurrentCaller, backend: BackendState, model_id: UUID | None = None
) -> list[ModelConfigOut]:
    """Configurations of all models, or of one."""
    if model_id is not None:
        return [_config(_found(backend.catalog.model(model_id), f"no model `{model_id}`"))]
    return [_config(model) for model in backend.catalog.models()]


@router.get("/model_configs/{config_id}")
async def get_config(config_id: UUID, caller: CurrentCaller, backend: BackendState) -> ModelConfigOut:
    """One configuration."""
    return _config(_found(backend.catalog.by_config(config_id), f"no model configuration `{config_id}`"))


def _found(model: CatalogModel | None, detail: str) -> CatalogModel:
    if model is None:
        raise HTTPException(404, detail)
    return model


def _model(model: CatalogModel, load_files: bool) -> ModelOut:
    return ModelOut(
        id=model.id,
        name=model.name,
        repo_modelId=model.repo_id,
        source_repository=model.repo_id,
        m_files=[_file(model)] if load_files else [],
    )


def _file(model: CatalogModel) -> ModelFileOut:
    size = model.weights.stat().st_size if model.weights.is_file() else None
    return ModelFileOut(id=model.file_id, model_id=model.id, name=model.weights.name, size=size, checksum=model.sha256)


def _config(model: CatalogModel) -> ModelConfigOut:
    return ModelConfigOut(
        id=model.config_id,
        m_id=model.id,
        m_file_id=model.file_id,
        config={"engine_name": ENGINE, "trained_context": model.trained_context},
    )
