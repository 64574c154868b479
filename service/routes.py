"""Every address of the service, what each needs of its caller, and which policy limits it."""

from __future__ import annotations

from aiohttp import web

from service.authentication import Door
from service.health import Health
from service.limiting.handler import Limits
from service.listing.handler import Listing
from service.pages.handler import ApiPages
from service.polling.handler import Polling
from service.polling.many_handler import PollingMany, batch_has_validator
from service.reporting.handler import Writing
from service.streaming.handler import Streaming
from service.streaming.socket_handler import Sockets


def routes(
    door: Door,
    polling: Polling,
    many: PollingMany,
    listing: Listing,
    streaming: Streaming,
    sockets: Sockets,
    writing: Writing,
    limits: Limits,
    health: Health,
    pages: ApiPages,
) -> list[web.RouteDef]:
    """The table of the service. Literal paths come before `{job_id}`."""
    polls, reads, streams, writes = door.polls, door.reads, door.streams, door.writes
    return [
        # open
        web.get("/healthz", health.healthz),
        web.get("/readyz", health.readyz),
        web.get("/openapi.json", pages.openapi),
        web.get("/docs", pages.docs),
        web.get("/docs/{file}", pages.docs_file),
        # reading
        web.get("/jobs", reads(listing.jobs, "list")),
        web.get("/jobs/status", reads(many.statuses, "bulk")),
        web.post("/jobs/status", reads(many.statuses_of_body, "bulk")),
        web.get("/jobs/batch/{batch_id}", polls(many.batch, policy="bulk", free=batch_has_validator)),
        web.get("/jobs/{job_id}", polls(polling.job, public=True)),
        web.get(
            "/jobs/{job_id}/status",
            door.upgrades(sockets.job_status, otherwise=polls(polling.status, public=True)),
        ),
        web.get("/jobs/{job_id}/result", polls(polling.result, free=None)),
        web.get("/jobs/{job_id}/results", polls(polling.result, free=None)),
        web.get("/jobs/{job_id}/history", reads(polling.history, "bulk")),
        web.get("/limits", door.looks(limits.limits)),
        # following
        web.post("/tickets", reads(streaming.ticket, "write")),
        web.get("/jobs/events", streams(streaming.events), allow_head=False),
        web.head("/jobs/events", _only_get),  # else it would be a question about a job `events`
        web.get("/jobs/batch/{batch_id}/events", streams(streaming.batch_events), allow_head=False),
        web.get("/jobs/{job_id}/events", streams(streaming.job_events, public=True), allow_head=False),
        # reporting
        web.post("/jobs", writes(writing.create)),
        web.post("/jobs/batch/{batch_id}/close", writes(writing.close_batch)),
        web.patch("/jobs", writes(writing.report_many)),
        web.patch("/jobs/{job_id}", writes(writing.report)),
        web.put("/jobs/{job_id}/result", writes(writing.put_result)),
        web.post("/jobs/{job_id}/cancel", writes(writing.cancel)),
        web.post("/jobs/{job_id}/retry", writes(writing.retry)),
        web.delete("/jobs/{job_id}", writes(writing.delete)),
    ]


async def _only_get(request: web.Request) -> web.StreamResponse:
    raise web.HTTPMethodNotAllowed(request.method, ["GET"])
