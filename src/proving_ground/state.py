"""What the routes share: the application's parts, found on `app.state`, and look-ups that keep tenants apart."""

from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

import httpx
from fastapi import Depends, HTTPException, Request

from execution_envelope import Admission
from proving_ground.agents import AgentRuns
from proving_ground.auth import OPERATOR, Caller, require_role
from proving_ground.catalog import Catalog
from proving_ground.deployment import Deployment
from proving_ground.jobs import JOBS, Full, Job, Jobs
from proving_ground.movement import Ingestions
from proving_ground.retrieval import Retrievals
from proving_ground.settings import Settings
from proving_ground.sources import Sources
from proving_ground.supervisor import Supervisor


@dataclass(frozen=True)
class Backend:
    """The parts of a running backend."""

    settings: Settings
    catalog: Catalog
    supervisor: Supervisor
    jobs: Jobs
    http: httpx.AsyncClient
    """For talking to engines."""
    agents: AgentRuns
    sources: Sources
    ingestions: Ingestions
    retrievals: Retrievals

    def deployments_of(self, caller: Caller) -> list[Deployment]:
        """All deployments of the caller's tenant, oldest first."""
        return [found for found in self.supervisor.deployments.values() if found.tenant == caller.tenant]

    def deployment_of(self, caller: Caller, deployment_id: UUID) -> Deployment:
        """One deployment; 404 when there is none or it is another tenant's, the same answer for both."""
        found = self.supervisor.deployments.get(deployment_id)
        if found is None or found.tenant != caller.tenant:
            raise HTTPException(404, f"no deployment `{deployment_id}`")
        return found

    def job_of(self, caller: Caller, kind: str, job_id: UUID) -> Job:
        """One job of a kind; 404 when there is none or it is another tenant's, the same answer for both."""
        for found in self.jobs.of(caller, kind, job_id):
            return found
        raise HTTPException(404, f"no {kind} `{job_id}`")

    async def start(self, admission: Admission, job: Job) -> None:
        """Bind a job to its envelope and run it; 429 when as many jobs of its tenant are open as there may be."""
        try:
            with self.jobs.place(job.owner):
                await admission.bind(job.kind, str(job.id), owner=JOBS)
                self.jobs.submit(job)
        except Full as full:
            raise HTTPException(429, str(full)) from full

    async def cancelled(self, caller: Caller, job: Job) -> bool:
        """End a job, and return when it has ended: whether that ended it.

        403 for anybody but its owner, which is type and subject, and operators of the tenant.
        """
        if (caller.type, caller.subject) != (job.owner.type, job.owner.subject):
            require_role(caller, OPERATOR)
        if job.ended:
            return False
        await self.jobs.cancel(job, f"{caller.type}:{caller.subject}")
        return job.status == "CANCELLED"  # it may have come to its own end meanwhile


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend


BackendState = Annotated[Backend, Depends(_backend)]
