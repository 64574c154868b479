"""Every address of the service, and the scope that each needs."""

from __future__ import annotations

from aiohttp import web

from service.authentication import Door
from service.health import Health
from service.identity import READ, WRITE
from service.polling.handler import Polling
from service.reporting.handler import Writing


def routes(door: Door, polling: Polling, writing: Writing, health: Health) -> list[web.RouteDef]:
    """The table of the service. Literal paths come before `{job_id}`."""
    reads, writes = door.needs(READ), door.needs(WRITE)
    return [
        # open
        web.get("/healthz", health.healthz),
        web.get("/readyz", health.readyz),
        # reading
        web.get("/jobs/{job_id}", reads(polling.job)),
        web.get("/jobs/{job_id}/status", reads(polling.status)),
        web.get("/jobs/{job_id}/result", reads(polling.result)),
        web.get("/jobs/{job_id}/results", reads(polling.result)),
        web.get("/jobs/{job_id}/history", reads(polling.history)),
        # reporting
        web.post("/jobs", writes(writing.create)),
        web.patch("/jobs", writes(writing.report_many)),
        web.patch("/jobs/{job_id}", writes(writing.report)),
        web.put("/jobs/{job_id}/result", writes(writing.put_result)),
        web.post("/jobs/{job_id}/cancel", writes(writing.cancel)),
        web.post("/jobs/{job_id}/retry", writes(writing.retry)),
        web.delete("/jobs/{job_id}", writes(writing.delete)),
    ]
