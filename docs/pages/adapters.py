"""`adapters.md`: what each adapter makes of a request, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from execution_envelope.adapters import kamiwaza, mcp, openai, ray
from execution_envelope.adapters.declared import MAX_SECRET_DEPTH, MAX_SECRET_NAMES, Always, Header, Mapped, Names, Raw
from pages.table import table

#: What functions make of fields, beside what they declare: (fields, what they become).
_BY_FUNCTION: Mapping[str, Sequence[tuple[str, str]]] = {
    "openai.completion": (
        ("model", "id of the target; constraint `model`"),
        (
            "n_predict, max_completion_tokens, max_tokens",
            "requested `output_tokens`: the largest of them, for all answers together; `-1` is unlimited",
        ),
        ("n, best_of, prompt", "how many answers: the larger of the two, to each prompt"),
        ("service_tier", "constraint `service_tier`"),
        ("web_search_options", "constraint `web_search_options`"),
        ("", "requested `requests`: 1"),
    ),
    "openai.embedding": (
        ("input", "requested `input_tokens`, where it is written in tokens; else in the digest only"),
    ),
    "openai.response": (("tools.*.type", "constraint `tools`: those that the server itself is to use"),),
    "mcp.tool_call": (
        ("params._meta.traceparent, params._meta.tracestate", "the trace of the envelope"),
        (f"params._meta.{mcp.PART_OF}", "the envelope that this one is part of"),
        (f"params._meta.{mcp.IDEMPOTENCY_KEY}", "the idempotency key"),
    ),
    "kamiwaza.deployment": (
        ("m_id", "id of the target"),
        ("m_config_id", "version of the target"),
        ("m_file_id", "constraint `weights`"),
        ("starting_copies, min_copies, max_copies", "requested `replicas`, its floor and its ceiling"),
        ("duration", "requested `duration`, in minutes"),
        ("max_concurrent_requests", "requested `concurrency`"),
        ("context", "requested `context`"),
        ("vram_allocation", "requested `gpu_memory` per replica; beside a minimum for each device a constraint"),
        ("gpu_allocation", "constraint `gpu_allocation`"),
        ("gpu_floor", "floor of requested `gpu`"),
        ("engine_name", "constraint `engine`"),
        ("location", "constraint `location`"),
        ("node_resource_type", "constraint `node_type`"),
        ("autoscaling, force_cpu, lb_port", "constraints of these names"),
        ("env", "constraint `env`: its names"),
        ("inferenceResources.cpu.requests.cpu", "requested `cpu` per replica"),
        ("inferenceResources.cpu.requests.memory", "requested `memory` per replica"),
        ("inferenceResources.cpu.architecture", "constraint `architecture`"),
        ("inferenceResources.accelerator.count", "requested `gpu` per replica; one where there is no count"),
        ("inferenceResources.accelerator.memory.minimum", "requested `gpu_memory` per device, and its floor"),
        ("inferenceResources.accelerator.capability", "constraint `accelerator`"),
        ("inferenceResources.accelerator.isolation", "constraint `isolation`"),
        ("inferenceResources.accelerator.profile", "constraint `gpu_profile`"),
        ("inferenceResources.runtime.selection", "constraint `runtime`"),
        ("inferenceResources.alternatives", "constraint `alternatives`"),
        ("inference_resources", "the same as `inferenceResources`, which counts where both are there"),
        ("header x-workroom-id", "scope `workroom`"),
    ),
}
#: Name -> request, what declares it (or None), target, secrets, client defaults, not part of admission.
_ADAPTERS: Mapping[str, tuple[str, Mapped | None, str, Sequence[str], Mapping[str, object], Iterable[str]]] = {
    "kamiwaza.deployment": (
        "`POST /serving/deploy_model`",
        None,
        "model.deploy",
        ["env.*"],
        kamiwaza.CLIENT_DEFAULTS,
        kamiwaza.NOT_ADMITTED,
    ),
    **{
        name: (request, mapped, mapped.kind, secrets, mapped.client_defaults, mapped.not_admitted)
        for name, request, mapped, secrets in (
            (
                "kamiwaza.ingestion",
                "`POST /ingestion/ingest/run`",
                kamiwaza.describe_ingestion,
                kamiwaza.describe_ingestion.secrets,
            ),
            (
                "kamiwaza.retrieval",
                "`POST /retrieval/jobs`",
                kamiwaza.describe_retrieval,
                kamiwaza.describe_retrieval.secrets,
            ),
            ("mcp.tool_call", "`tools/call`, the JSON-RPC request", mcp._CALL, mcp._CALL.secrets),
            ("openai.batch", "`POST /v1/batches`", openai.describe_batch, openai.describe_batch.secrets),
            ("openai.embedding", "`POST /v1/embeddings`", openai._EMBEDDING, openai._EMBEDDING.secrets),
            ("openai.response", "`POST /v1/responses`", openai._RESPONSE, openai.RESPONSE_SECRETS),
            ("ray.job", "`POST /api/jobs/`", ray.describe_job, ray.describe_job.secrets),
        )
    },
    "openai.completion": (
        "`POST /v1/chat/completions`, `POST /v1/completions`",
        None,
        "inference",
        [],
        {},
        openai.COMPLETION_NOT_ADMITTED,
    ),
}


def page() -> str:
    text = (
        "# Adapters\n\nWhat each adapter makes of a request, field by field; "
        '[how to write one](../howto/write-an-adapter.md). By name: `adapters.load("openai.completion")`. Null is '
        "absent. A field that is *not part of admission* is in the digest of the request only; `path.*` stands for the "
        "other names of an open object, `*` for those of the body. *Secrets* are in no digest either. A value equal to "
        "a *client default* is recorded as one and never reported as ignored. Where every field is a secret whose name "
        "says so, what is "
        f"nested deeper than {MAX_SECRET_DEPTH} levels is one as a whole, and with more than {MAX_SECRET_NAMES} the "
        "whole object is.\n"
    )
    for name, (request, mapped, kind, secrets, defaults, rest) in sorted(_ADAPTERS.items()):
        rows = [] if mapped is None else _declared(mapped)
        rows += _BY_FUNCTION.get(name, ())
        shown = [
            (", ".join(f"`{f}`" for f in fields.split(", ")) if fields else "always", said) for fields, said in rows
        ]
        text += f"\n## {name}\n\n{request}, kind `{kind}`.\n\n{table(('field', 'becomes'), shown)}"
        told = {
            "Secrets": [*secrets, *(f"{path}, names that say so" for path in (mapped.secret_names if mapped else ()))],
            "Client defaults": [_default(key, value) for key, value in defaults.items()],
            "Not part of admission": sorted(rest),
        }
        for what, items in told.items():
            if items:
                text += f"\n{what}: {', '.join(f'`{item}`' for item in items)}.\n"
    return text


def _default(name: str, value: object) -> str:
    plain = value["amount"] if isinstance(value, dict) else value
    return f"{name} {msgspec.json.encode(plain).decode()}"


def _declared(mapped: Mapped) -> list[tuple[str, str]]:
    """The rows of what an adapter declares."""

    def at(path: object) -> str:
        if isinstance(path, Header):
            return f"header {path.name}"
        return ", ".join((path,) if isinstance(path, str) else path)  # type: ignore[arg-type]

    rows = [(at(mapped.target_id), f"id of the target, a {mapped.target}")]
    for name, read in mapped.resources.items():
        if isinstance(read, Always):
            rows.append(("", f"requested `{name}`: {read.value}"))
            continue
        raw = read if isinstance(read, Raw) else Raw(read)
        unit = f", in {raw.unit}" if raw.unit else ""
        rows.append((at(raw.path), f"requested `{name}`{unit}" + (", rounded up" if raw.round_up else "")))
    for name, constraint in mapped.constraints.items():
        if isinstance(constraint, Names):
            rows.append((at(constraint.path), f"constraint `{name}`: its names"))
        elif not isinstance(constraint, Always):
            rows.append((at(constraint), f"constraint `{name}`"))
    return rows + [(at(path), f"scope `{name}`") for name, path in mapped.scope.items()]
