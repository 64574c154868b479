"""Asks only for what has changed. usage: python poll_when_changed.py JOB_ID"""

import os
import sys
import time

import requests

session = requests.Session()
session.headers["Authorization"] = f"Bearer {os.environ['API_KEY']}"
etag, unchanged = None, 0

while True:
    response = session.get(
        f"{os.environ['API_URL']}/jobs/{sys.argv[1]}", headers={"If-None-Match": etag} if etag else {}
    )
    if response.status_code == 304:
        unchanged += 1
    else:
        response.raise_for_status()
        etag = response.headers["ETag"]
        job = response.json()
        print(f"version {job['version']}: {job['status']}")
        if job["status"] in {"COMPLETED", "FAILED", "CANCELLED"}:
            break
    time.sleep(0.1)

print(f"not changed: {unchanged} times")
