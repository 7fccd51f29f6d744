#!/bin/sh
# Signs a body as GitHub does, and sends it: GITHUB_HOOK_SECRET=... send_github.sh URL workflow_run '{"action": "completed"}'
set -eu
url=$1 event=$2 body=$3 id=${4:-$(openssl rand -hex 16)}
signature=$(printf %s "$body" | openssl dgst -sha256 -hmac "$GITHUB_HOOK_SECRET" | sed 's/^.* //')
exec curl --silent --show-error --include "$url" --data-raw "$body" -H 'Content-Type: application/json' \
  -H "X-GitHub-Event: $event" -H "X-GitHub-Delivery: $id" -H "X-Hub-Signature-256: sha256=$signature"
