#!/usr/bin/env bash
# Time per token of a running server with exits and without, interleaved. Nobody else may ask it meanwhile.
#   examples/bench.sh [URL] [TURNS]
# Keys are taken from OPENAI_API_KEY, and from APPARATE_ADMIN_KEY where there is one. `apparate-llm eval` measures better.
set -euo pipefail
url=${1:-http://localhost:8000} turns=${2:-4}
key=${OPENAI_API_KEY:-none}
with_key() { curl -sS --fail-with-body -H "Authorization: Bearer $1" -H 'Content-Type: application/json' "${@:2}"; }
ask() { with_key "$key" "$@"; }
config() { with_key "${APPARATE_ADMIN_KEY:-$key}" "$url/early_exit/config" "$@"; }
set_policy() { config -o /dev/null -X PATCH -d "{\"policy\": \"$1\"}"; }

field() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }

model=$(ask "$url/v1/models" | field '["data"][0]["id"]')
policy=$(config | field '["config"]["policy"]')
trap 'set_policy "$policy"' EXIT

# Seconds and tokens after the first token of each answer, so far.
counted() { ask "$url/metrics" | awk '/^apparate:decode_seconds_total /{s=$2} /^apparate:decode_tokens_total /{t=$2} END{print s, t}'; }

answer() {
  for prompt in 'Write a Python function that reverses a list.' 'Explain to a child why the sky is blue.'; do
    ask -o /dev/null "$url/v1/chat/completions" -d "{\"model\": \"$model\", \"temperature\": 0, \"max_tokens\": 96,
      \"messages\": [{\"role\": \"user\", \"content\": \"$prompt\"}]}"
  done
}

turn() {
  local before
  set_policy "$1"
  before=$(counted)
  answer
  sleep 2 # the metrics are at most a second old
  echo "$1 $before $(counted)"
}

answer && sleep 2 # does not count: the controller learns
for _ in $(seq "$turns"); do
  turn "$policy"
  turn off
done | awk '
  { s[$1] += $4 - $2; t[$1] += $5 - $3; printf "%-10s %6.2f ms per token\n", $1, 1000 * ($4 - $2) / ($5 - $3) }
  END { for (p in s) if (p != "off") printf "%s over off: %.2f\n", p, (s[p] / t[p]) / (s["off"] / t["off"]) }'
