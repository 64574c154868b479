"""Asks less and less often until the job is done. usage: python poll_with_backoff.py JOB_ID"""

import os
import random
import sys
import time

import requests


def poll(job_id, first_delay=0.2, max_delay=10, max_attempts=50):
    url = f"{os.environ['API_URL']}/jobs/{job_id}/status"
    delay = first_delay
    for attempt in range(1, max_attempts + 1):
        try:
            response = requests.get(url, headers={"api-key": os.environ["API_KEY"]}, timeout=10)
            response.raise_for_status()
        except requests.ConnectionError as error:
            print(f"attempt {attempt}: {error}")
        else:
            job = response.json()
            progress = job.get("progress") or {}
            print(f"attempt {attempt}: {job['status']} {progress.get('percentage', 0)}% {progress.get('message', '')}")
            if job["status"] in ("completed", "failed", "cancelled"):
                return job
        time.sleep(delay * random.uniform(0.8, 1.2))
        delay = min(delay * 1.5, max_delay)
    raise TimeoutError(f"job {job_id} is still not done")


job = poll(sys.argv[1])
if job["status"] != "completed":
    details = job["error_details"]
    sys.exit(f"{job['operation']} {job['status']}: {details['error_type']}: {details['message']}")
print(f"{job['operation']} completed at {job['completed_at']}")
