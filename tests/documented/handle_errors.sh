#!/bin/sh
# Looks at a job and says what to do where that is refused. usage: handle_errors.sh JOB_ID
set -eu
answer=$(curl -sS -w '\n%{http_code}' -H "X-API-Key: $API_KEY" "$API_URL/jobs/$1")
code=$(echo "$answer" | tail -n 1)
value() { echo "$answer" | grep -o "\"$1\":\"[^\"]*\"" | head -n 1 | sed "s/\"$1\":\"\(.*\)\"/\1/"; }

case $code in
  200) echo "status: $(value status)" && exit 0 ;;
  404) echo "$(value error) ($(value error_type)): $(value message)" ;;
  403) echo "not yours: $(value detail)" ;;
  401) echo "who are you? $(value detail)" ;;
  *) echo "HTTP $code" >&2 && exit 99 ;;
esac
suggestions=$(echo "$answer" | sed -n 's/.*"suggestions":\["\(.*\)"\],"request_id".*/\1/p')
echo "- $suggestions" | sed 's/","/\n- /g'
exit $((code - 400))
