"""`POST /api/jobs/` of Ray's job server, as `ray.job_submission.JobSubmissionClient.submit_job` sends it.

A job is a program that starts further work by itself, so its kind is `agent.run`. What it asks for is what Ray reserves
for its entrypoint; tasks and actors that it starts ask Ray for their own. A backend whose jobs are all of another kind
says so: ``dataclasses.replace(describe_job, kind="evaluation")``.
"""

from __future__ import annotations

from typing import Final

from execution_envelope.adapters.declared import Mapped, Names, Raw

#: The ask of a job. A job without an id of its own, which Ray then makes up, is *unnamed*. Ray counts in
#: ten-thousandths; what is finer than a thousandth of a core or a device counts as one more.
describe_job: Final = Mapped(
    kind="agent.run",
    operation="jobs.submit",
    entrypoint="POST /api/jobs/",
    target="job",
    target_id=("submission_id", "job_id"),
    unnamed="unnamed",
    resources={
        "cpu": Raw("entrypoint_num_cpus", round_up=True),
        "gpu": Raw("entrypoint_num_gpus", round_up=True),
        "memory": Raw("entrypoint_memory", round_up=True),
    },
    constraints={
        "custom_resources": "entrypoint_resources",
        "labels": "entrypoint_label_selector",
        "env": Names("runtime_env.env_vars"),
        "image": ("runtime_env.image_uri", "runtime_env.container.image"),
        "working_dir": "runtime_env.working_dir",
        "pip": "runtime_env.pip",
        "uv": "runtime_env.uv",
        "conda": "runtime_env.conda",
    },
    scope={
        "project": "metadata.project",
        "environment": "metadata.environment",
        "purpose": "metadata.purpose",
        "classification": "metadata.classification",
    },
    secrets=["runtime_env.env_vars.*"],
    schema="ray.JobSubmitRequest/1",
    not_admitted=["entrypoint", "metadata.*", "runtime_env.*"],
)
