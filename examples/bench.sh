#!/usr/bin/env bash
# Time per token of a running server with exits and without, in turns. Nobody else may ask it meanwhile.
#   examples/bench.sh [URL] [TURNS]
# KEY may change options: the admin key, or an API key where there is no admin key. `apparate-llm eval` measures better.
set -euo pipefail
url=${1:-http://localhost:8000} turns=${2:-4}
auth=(-H "Authorization: Bearer ${KEY:-${OPENAI_API_KEY:-none}}")
ask() { curl -sS --fail-with-body "${auth[@]}" -H 'Content-Type: application/json' "$@"; }

field() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }

model=$(ask "$url/v1/models" | field '["data"][0]["id"]')
policy=$(ask "$url/early_exit/config" | field '["config"]["policy"]')
trap 'ask -o /dev/null -X PATCH "$url/early_exit/config" -d "{\"policy\": \"$policy\"}"' EXIT

# Seconds and tokens after the first token of each answer, so far.
counted() { ask "$url/metrics" | awk '/^apparate:decode_seconds_total /{s=$2} /^apparate:decode_tokens_total /{t=$2} END{print s, t}'; }

turn() {
  ask -o /dev/null -X PATCH "$url/early_exit/config" -d "{\"policy\": \"$1\"}"
  local before
  before=$(counted)
  for prompt in 'Write a Python function that reverses a list.' 'Explain to a child why the sky is blue.'; do
    ask -o /dev/null "$url/v1/chat/completions" -d "{\"model\": \"$model\", \"temperature\": 0, \"max_tokens\": 96,
      \"messages\": [{\"role\": \"user\", \"content\": \"$prompt\"}]}"
  done
  sleep 2 # the metrics are at most a second old
  echo "$1 $before $(counted)"
}

for _ in $(seq "$turns"); do
  turn "$policy"
  turn off
done | awk '
  { s[$1] += $4 - $2; t[$1] += $5 - $3; printf "%-10s %6.2f ms per token\n", $1, 1000 * ($4 - $2) / ($5 - $3) }
  END { for (p in s) if (p != "off") printf "%s over off: %.2f\n", p, (s[p] / t[p]) / (s["off"] / t["off"]) }'
