"""Asks for several jobs in one call until all are done. usage: python check_many.py JOB_ID..."""

import os
import sys
import time

import requests

job_ids = sys.argv[1:]
while True:
    response = requests.get(
        f"{os.environ['API_URL']}/jobs/status",
        headers={"X-API-Key": os.environ["API_KEY"]},
        params={"job_ids": ",".join(job_ids), "include_progress": True},
    )
    response.raise_for_status()
    jobs = response.json()["jobs"]
    done = [job for job in jobs if job["status"] in ("completed", "failed", None)]
    print(f"{len(done)} of {len(jobs)} done")
    if len(done) == len(jobs):
        break
    time.sleep(0.3)

for job in jobs:
    if job["status"] is None:
        print(f"{job['job_id']}: {job['error']['error_type']}")
    else:
        print(f"{job['job_id']}: {job['status']} {job['progress'].get('percentage')}%")
