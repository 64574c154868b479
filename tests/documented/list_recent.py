"""Lists the jobs of the last day, page by page. usage: python list_recent.py [STATUS [TAGS]]"""

import os
import sys
from datetime import datetime, timedelta

import requests

params = {
    "created_after": (datetime.utcnow() - timedelta(days=1)).isoformat() + "Z",
    "created_before": datetime.utcnow().isoformat() + "Z",
    "limit": 10,
    "offset": 0,
}
params.update(zip(("status", "tags"), sys.argv[1:], strict=False))

while True:
    response = requests.get(
        f"{os.environ['API_URL']}/jobs", headers={"X-API-Key": os.environ["API_KEY"]}, params=params
    )
    response.raise_for_status()
    page = response.json()
    for job in page["jobs"]:
        reason = f": {job['error_details']['message']}" if job["error_details"] else ""
        print(f"{job['job_id']} {job['operation']} {job['status']} {job['created_at']}{reason}")
    pagination = page["pagination"]
    if not pagination["has_more"]:
        break
    params["offset"] = pagination["offset"] + pagination["limit"]

print(f"total: {pagination['total']}")
