"""Watches a batch until all its jobs are done. usage: python monitor_batch.py BATCH_ID"""

import os
import sys
import time

import requests


def monitor(batch_id, poll_interval=0.3):
    url = f"{os.environ['API_URL']}/jobs/batch/{batch_id}"
    while True:
        response = requests.get(url, headers={"X-API-Key": os.environ["API_KEY"]}, params={"include_progress": True})
        response.raise_for_status()
        batch = response.json()
        print(
            f"{batch['status']}: {batch['overall_progress']}% "
            f"({batch['completed_jobs']} completed, {batch['failed_jobs']} failed of {batch['total_jobs']})"
        )
        if batch["status"] in ("completed", "completed_with_failures", "failed", "cancelled"):
            return batch
        time.sleep(poll_interval)


batch = monitor(sys.argv[1])
for job in batch["jobs"]:
    print(f"{job['job_id']} {job['operation']} {job['status']} {job['progress']}%")
sys.exit(1 if batch["failed_jobs"] else 0)
