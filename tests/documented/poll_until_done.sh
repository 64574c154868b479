#!/bin/sh
# Asks every half second until the job is done. usage: poll_until_done.sh JOB_ID [MAX_WAIT_SECONDS]
set -eu
value() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }

end=$(($(date +%s) + ${2:-300}))
while [ "$(date +%s)" -lt "$end" ]; do
  job=$(curl -sS --fail -H "X-API-Key: $API_KEY" -H 'accept: application/json' "$API_URL/jobs/$1")
  status=$(echo "$job" | value status)
  echo "status: $status"
  case $status in
    COMPLETED)
      echo "$(echo "$job" | value pdf_name) ($(echo "$job" | value type)) took from" \
        "$(echo "$job" | value created_at) to $(echo "$job" | value updated_at)"
      exit 0
      ;;
    FAILED)
      echo "$(echo "$job" | value pdf_name) failed: $(echo "$job" | value error)" >&2
      exit 1
      ;;
  esac
  sleep 0.5
done
echo "job $1 was not done within ${2:-300} seconds" >&2
exit 1
