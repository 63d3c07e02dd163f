"""Requests and answers of the routes that move data, in the shapes the SDK writes and reads."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class ActiveIngestRequest(BaseModel):
    """Move something now. `kwargs` are of the source type's own, see the page of the proving ground."""

    model_config = ConfigDict(extra="forbid")

    source_type: str = Field(max_length=64)
    kwargs: dict[str, Any] = Field(default_factory=dict, max_length=64)


class IngestJobCreate(BaseModel):
    """The same, not waited for, under an id of the caller's own. `schedule` is ``@once``."""

    model_config = ConfigDict(extra="forbid")

    job_id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    schedule: str
    source_type: str = Field(max_length=64)
    conn_args: dict[str, Any] = Field(default_factory=dict, max_length=64)


class IngestOut(BaseModel):
    """What became of an ingestion; all after `errors` is ours, the SDK drops it."""

    urns: list[str] = Field(default_factory=list)
    status: str
    errors: list[str] = Field(default_factory=list)
    job_id: UUID
    bytes: int
    rows: int | None = None
    sha256: str | None = None
    truncated: bool | None = None


class IngestStatusOut(BaseModel):
    """How far an ingestion is; all after `created_urns` is ours."""

    job_id: str
    last_run: datetime | None
    status: str
    error_count: int
    created_urns: list[str]
    errors: list[str]
    bytes_moved: int
    bytes_total: int | None


class OperationOut(BaseModel):
    """That something was accepted."""

    status: str
    job_id: UUID


class RetrievalRequest(BaseModel):
    """Rows of a data set. `options` carry amounts and scope, see the page of the proving ground."""

    model_config = ConfigDict(extra="forbid")

    dataset_urn: str = Field(max_length=4096)
    transport: str = "auto"
    limit_rows: int | None = Field(default=None, ge=1)
    offset: int | None = Field(default=None, ge=0)
    filters: dict[str, Any] | None = Field(default=None, max_length=64)
    options: dict[str, Any] | None = Field(default=None, max_length=64)
    columns: list[str] | None = Field(default=None, max_length=256)
    credential_override: SecretStr | None = None
    format_hint: str | None = Field(default=None, max_length=64)
    batch_size: int | None = Field(default=None, ge=1)
    sdk_session: str | None = None


class DatasetOut(BaseModel):
    """What a job reads from."""

    urn: str
    platform: str
    path: str | None = None
    format: str | None = None
    estimated_bytes: int | None = None
    estimated_rows: int | None = None


class InlineOut(BaseModel):
    """Rows in one answer."""

    media_type: str = "application/json"
    data: list[dict[str, Any]]
    row_count: int
    metadata: dict[str, Any]


class RetrievalOut(BaseModel):
    """A job that was accepted, and with the transport `inline` its rows."""

    job_id: UUID
    transport: str
    status: str
    dataset: DatasetOut
    inline: InlineOut | None = None


class ProgressOut(BaseModel):
    """What was delivered."""

    bytes_processed: int | None = None
    rows_processed: int | None = None


class RetrievalStatusOut(BaseModel):
    """How far a retrieval is; `error` is ours."""

    job_id: UUID
    status: str
    transport: str
    dataset: DatasetOut
    progress: ProgressOut
    created_at: datetime
    updated_at: datetime
    error: str | None = None


class CatalogEntryOut(BaseModel):
    """A data set as the catalogue lists it."""

    urn: str
    name: str
    platform: str
    environment: str = "PROD"
    description: str | None = None
    tags: list[str] = Field(default_factory=list)
    properties: dict[str, Any]
    created_at: datetime | None = None
    updated_at: datetime | None = None
