#!/bin/sh
# Signs a body as Standard Webhooks has it, and sends it: HOOK_SECRET=whsec_... send.sh URL '{"experiment": "digits"}'
set -eu
url=$1 body=$2 id=${3:-msg_$(openssl rand -hex 12)} now=$(date +%s)
key=$(printf %s "${HOOK_SECRET#whsec_}" | openssl base64 -d -A | od -An -v -tx1 | tr -d ' \n')
signature=$(printf %s "$id.$now.$body" | openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | openssl base64 -A)
exec curl --silent --show-error --include "$url" --data-raw "$body" \
  -H 'Content-Type: application/json' -H "webhook-id: $id" -H "webhook-timestamp: $now" -H "webhook-signature: v1,$signature"
