"""Looks at a job and says what to do where that is refused. usage: python handle_errors.py JOB_ID"""

import os
import sys

import requests

response = requests.get(f"{os.environ['API_URL']}/jobs/{sys.argv[1]}", headers={"X-API-Key": os.environ["API_KEY"]})
if response.status_code == 200:
    print(f"status: {response.json()['status']}")
    sys.exit()

problem = response.json()
if response.status_code == 404:
    print(f"{problem['error']} ({problem['details']['error_type']}): {problem['details']['message']}")
elif response.status_code == 403:
    print(f"not yours: {problem['detail']}")
elif response.status_code == 401:
    print(f"who are you? {problem['detail']}")
else:
    response.raise_for_status()
for suggestion in problem["suggestions"]:
    print(f"- {suggestion}")
sys.exit(response.status_code - 400)
