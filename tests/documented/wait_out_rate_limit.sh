#!/bin/sh
# Asks many times; curl waits as long as it is told to. usage: wait_out_rate_limit.sh JOB_ID TIMES
set -eu
n=0
while [ $((n += 1)) -le "$2" ]; do
  job=$(curl -sS --fail --retry 5 -H "X-API-Key: $API_KEY" "$API_URL/jobs/$1")
  echo "$n: $(echo "$job" | sed -n 's/.*"status":"\([^"]*\)".*/\1/p')"
done
