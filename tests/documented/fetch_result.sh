#!/bin/sh
# Downloads the result as soon as there is one. usage: fetch_result.sh JOB_ID FILE
set -eu
head=$(mktemp)
trap 'rm "$head"' EXIT
header() { tr -d '\r' <"$head" | sed -n "s/^$1: //Ip"; }

while true; do
  code=$(curl -sS -o "$2" -D "$head" -w '%{http_code}' -H "X-API-Key: $API_KEY" "$API_URL/jobs/$1/result")
  if [ "$code" = 200 ]; then
    echo "saved $(wc -c <"$2") bytes of $(header Content-Type)"
    exit 0
  fi
  echo "$code: $(sed -n 's/.*"detail":"\([^"]*\)".*/\1/p' "$2")"
  delay=$(header Retry-After)
  [ -n "$delay" ] || exit 1
  sleep "$delay"
done
