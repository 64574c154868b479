"""Asks many times and waits as long as it is told to. usage: python wait_out_rate_limit.py JOB_ID TIMES"""

import os
import sys
import time

import requests


def get(url, max_retries=5):
    for attempt in range(max_retries):
        response = requests.get(url, headers={"X-API-Key": os.environ["API_KEY"]})
        if response.status_code != 429:
            response.raise_for_status()
            return response.json()
        delay = int(response.headers.get("Retry-After", 2**attempt))
        print(f"rate limited, waiting {delay} s")
        time.sleep(delay)
    raise RuntimeError("still rate limited")


for n in range(int(sys.argv[2])):
    job = get(f"{os.environ['API_URL']}/jobs/{sys.argv[1]}")
    print(f"{n + 1}: {job['status']}")
