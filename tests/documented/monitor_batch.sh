#!/bin/sh
# Watches a batch until it is at 100 %. usage: monitor_batch.sh BATCH_ID
set -eu
number() { sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p"; }

percent=0
while true; do
  batch=$(curl -sS --fail -H "X-API-Key: $API_KEY" "$API_URL/jobs/batch/$1")
  percent=$(echo "$batch" | number overall_progress)
  failed=$(echo "$batch" | number failed_jobs)
  echo "$(echo "$batch" | sed -n 's/.*"batch_id":"[^"]*","status":"\([^"]*\)".*/\1/p'): $percent%" \
    "($(echo "$batch" | number completed_jobs) completed, $failed failed of $(echo "$batch" | number total_jobs))"
  [ "$percent" -lt 100 ] || break
  sleep 0.3
done
[ "$failed" -eq 0 ]
