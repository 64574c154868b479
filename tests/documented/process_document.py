"""Hands a document in, waits for it and reads the result. usage: python process_document.py FILE_NAME"""

import os
import sys
import time

import requests

API_URL = os.environ["API_URL"]
session = requests.Session()
session.headers["X-API-Key"] = os.environ["API_KEY"]

created = session.post(f"{API_URL}/jobs", json={"type": "extraction", "pdf_name": sys.argv[1]})
created.raise_for_status()
job = created.json()
print(f"job {job['id']} is {job['status']}")

while job["status"] not in ("COMPLETED", "FAILED"):
    time.sleep(0.5)
    job = session.get(f"{API_URL}/jobs/{job['id']}").json()

if job["status"] == "FAILED":
    sys.exit(f"failed: {job['error']} ({job['error_details']['error_type']})")
result = session.get(f"{API_URL}{job['result_url']}").json()
print(f"{result['pages']} pages")
