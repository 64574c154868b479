"""Asks every half second until the job is done. usage: python poll_until_done.py JOB_ID [MAX_WAIT_SECONDS]"""

import os
import sys
import time

import requests

API_URL = os.environ["API_URL"]
HEADERS = {"X-API-Key": os.environ["API_KEY"], "Content-Type": "application/json"}


def wait_for_job(job_id, poll_interval=0.5, max_wait=300):
    started = time.time()
    while time.time() - started < max_wait:
        response = requests.get(f"{API_URL}/jobs/{job_id}", headers=HEADERS)
        response.raise_for_status()
        job = response.json()
        print(f"status: {job['status']}")
        if job["status"] == "COMPLETED":
            return job, True
        if job["status"] == "FAILED":
            return job, False
        time.sleep(poll_interval)
    raise TimeoutError(f"job {job_id} was not done within {max_wait} seconds")


job, succeeded = wait_for_job(sys.argv[1], max_wait=float(sys.argv[2]) if len(sys.argv) > 2 else 300)
if succeeded:
    print(f"{job['pdf_name']} ({job['type']}) took from {job['created_at']} to {job['updated_at']}")
else:
    sys.exit(f"{job['pdf_name']} failed: {job['error']}")
