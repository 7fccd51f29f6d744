#!/bin/sh
# Signs a body as Standard Webhooks has it, and sends it: HOOK_SECRET=whsec_... send.sh URL '{"experiment": "digits"}'
# The secret is in the environment alone: the words of a command can be seen by everybody on its host.
set -eu
url=$1 body=$2 now=$(date +%s) id=${3:-msg_$(python3 -c 'import secrets; print(secrets.token_hex(12))')}
signature=$(SIGNED="$id.$now.$body" python3 -c '
import base64, hashlib, hmac, os
secret = os.environ["HOOK_SECRET"].removeprefix("whsec_")
key = base64.b64decode(secret + "=" * (-len(secret) % 4))
print(base64.b64encode(hmac.new(key, os.environb[b"SIGNED"], hashlib.sha256).digest()).decode())')
exec curl --silent --show-error --fail-with-body --include "$url" --data-raw "$body" \
  -H 'Content-Type: application/json' -H "webhook-id: $id" -H "webhook-timestamp: $now" -H "webhook-signature: v1,$signature"
