"""Downloads the result as soon as there is one. usage: python fetch_result.py JOB_ID FILE"""

import os
import sys
import time

import requests

job_id, file = sys.argv[1:]
while True:
    response = requests.get(
        f"{os.environ['API_URL']}/jobs/{job_id}/result", headers={"X-API-Key": os.environ["API_KEY"]}, stream=True
    )
    if response.status_code == 200:
        with open(file, "wb") as out:
            for chunk in response.iter_content(chunk_size=8192):
                out.write(chunk)
        print(f"saved {os.path.getsize(file)} bytes of {response.headers['Content-Type']}")
        break
    print(f"{response.status_code}: {response.json()['detail']}")
    if "Retry-After" not in response.headers:
        sys.exit(1)
    time.sleep(int(response.headers["Retry-After"]))
