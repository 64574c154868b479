#!/bin/sh
# Asks only for what has changed; curl keeps the ETag in a file. usage: poll_when_changed.sh JOB_ID
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
unchanged=0

while true; do
  code=$(curl -sS -o "$folder/job" -w '%{http_code}' -H "Authorization: Bearer $API_KEY" \
    --etag-compare "$folder/etag" --etag-save "$folder/etag" "$API_URL/jobs/$1")
  if [ "$code" = 304 ]; then
    unchanged=$((unchanged + 1))
  else
    status=$(sed -n 's/.*"status":"\([^"]*\)".*/\1/p' "$folder/job")
    echo "version $(sed -n 's/.*"version":\([0-9]*\).*/\1/p' "$folder/job"): $status"
    case $status in COMPLETED | FAILED | CANCELLED) break ;; esac
  fi
  sleep 0.1
done
echo "not changed: $unchanged times"
