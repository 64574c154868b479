"""A client in Python, of which openapi-python-client makes all but this file (jobwire_client).

It creates a job, polls it until it is COMPLETED, and reads it in every other way; each thing seen is a line of JSON.
Usage: python poll.py URL KEY
"""

import json
import sys
import time

from jobwire_client import AuthenticatedClient
from jobwire_client.api.reading import get_batch, get_job, get_job_result, get_statuses, list_jobs, query_statuses
from jobwire_client.api.reporting import create_jobs
from jobwire_client.models import FreeObject, Job, JobIds, JobState, NewJob, Problem
from jobwire_client.types import UNSET


def say(what, said):
    print(json.dumps({"what": what, "said": said}), flush=True)


def known(value):
    return None if value is UNSET else value


def create(api):
    metadata = FreeObject.from_dict({"invoice": 4711})
    job = create_jobs.sync(
        client=api, body=NewJob(type_="extraction", batch_id="typed", tags=["a", "b"], metadata=metadata)
    )
    assert isinstance(job, Job), job
    return job


def poll(api, job_id):
    etag, last = UNSET, None
    while last != JobState.COMPLETED:
        answer = get_job.sync_detailed(job_id, client=api, if_none_match=etag)
        if answer.status_code == 304:
            time.sleep(0.02)
            continue
        job, etag = answer.parsed, answer.headers["ETag"]
        assert isinstance(job, Job), job
        last = job.status
        say("job", {"status": job.status, "percentage": known(job.progress.percentage)})


def main(url, key):
    api = AuthenticatedClient(url, key, raise_on_unexpected_status=True)
    job = create(api)
    say("created", {"id": job.id, "pdf_name": job.pdf_name, "invoice": job.metadata["invoice"]})
    poll(api, job.id)
    say("result", json.load(get_job_result.sync(job.id, client=api).payload))

    page = list_jobs.sync(client=api, tags=["a", "b"], status=[JobState.COMPLETED, JobState.FAILED])
    say("list", {"total": page.pagination.total, "states": [[listed.job_id, listed.status] for listed in page.jobs]})
    batch = get_batch.sync("typed", client=api)
    said = {"status": batch.status, "completed": batch.completed_jobs, "overall": batch.overall_progress}
    say("batch", said)

    asked = get_statuses.sync(client=api, job_ids=[job.id, "none"])
    posted = query_statuses.sync(client=api, body=JobIds([job.id, "none"], include_progress=True))
    say("many", [[line.job_id, line.status, line.error.error_type if line.error else None] for line in asked.jobs])
    say("many with progress", [line.progress.percentage if line.progress else None for line in posted.jobs])

    missing = get_job.sync("none", client=api)
    assert isinstance(missing, Problem), missing
    said = {"status": missing.status, "error_type": missing.details.error_type, "job_id": missing.details["job_id"]}
    say("problem", said | {"suggestions": len(missing.suggestions)})


main(*sys.argv[1:])
