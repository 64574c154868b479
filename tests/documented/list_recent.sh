#!/bin/sh
# Lists the jobs of the last day, page by page. usage: list_recent.sh [STATUS [TAGS]]
set -eu
since=$(date -u -d '1 day ago' +%Y-%m-%dT%H:%M:%SZ)
offset=0

while true; do
  page=$(curl -sS --fail -G -H "X-API-Key: $API_KEY" "$API_URL/jobs" --data-urlencode "created_after=$since" \
    -d limit=10 -d "offset=$offset" ${1:+--data-urlencode "status=$1"} ${2:+--data-urlencode "tags=$2"})
  echo "$page" | grep -o '"job_id":"[^"]*","status":"[^"]*","operation":"[^"]*"' |
    sed 's/"job_id":"\(.*\)","status":"\(.*\)","operation":"\(.*\)"/\1 \3 \2/' || true
  case $page in *'"has_more":true'*) offset=$((offset + 10)) ;; *) break ;; esac
done
echo "total: $(echo "$page" | sed -n 's/.*"total":\([0-9]*\).*/\1/p')"
