"""Lets the library wait where it is refused for a while. usage: python retrying_session.py JOB_ID TIMES"""

import os
import sys

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

session = requests.Session()
session.headers.update({"X-API-Key": os.environ["API_KEY"]})
retries = Retry(total=5, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=["GET"])
session.mount("http://", HTTPAdapter(max_retries=retries))
session.mount("https://", HTTPAdapter(max_retries=retries))

for n in range(int(sys.argv[2])):
    response = session.get(f"{os.environ['API_URL']}/jobs/{sys.argv[1]}")
    response.raise_for_status()
    print(f"{n + 1}: {response.json()['status']} ({len(response.raw.retries.history)} retries)")
