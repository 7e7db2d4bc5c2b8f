#!/usr/bin/env bash
# Packages: openpi-client 0.1.2 and openpi-server 0.1.0 with websockets 17.4.
# Expected: a client waits as long as its policy takes for an answer, as it does with websockets 14.2.
# What happens: since websockets 15 the client's side sends a ping every 20 seconds and closes the connection when there is
#   no pong 20 seconds later. openpi's server computes inside its event loop and cannot answer meanwhile, so that a policy
#   which takes more than 40 seconds ends the episode with ConnectionClosedError, though server and network are fine.
#   openpi-client takes any websockets from 11 on and leaves the ping at its default.
# Why it matters here: the first answer is the slow one: pi0 in JAX compiles then, torch.compile tunes for minutes, and a
#   policy of billions of weights on a CPU is as slow every time. All later answers would be fast.
# Seen on 2026-11-29. It waits 45 seconds for each of the two releases, side by side.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > "$work/answer.py" <<'PY'
import socket
import threading
import time
from importlib.metadata import version

import numpy as np
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_server import WebsocketPolicyServer


class Policy(BasePolicy):
    """Takes as long as the observation says."""

    def infer(self, obs):
        time.sleep(obs["seconds"])
        return {"actions": np.zeros((10, 7), np.float32)}


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = WebsocketPolicyServer(Policy(), "127.0.0.1", port)
threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep(2)
for seconds in (1, 45):
    try:
        result = str(WebsocketClientPolicy("127.0.0.1", port).infer({"seconds": seconds})["actions"].shape)
    except Exception as error:  # noqa: BLE001
        result = f"{type(error).__name__}: {error}"
    print(f"websockets {version('websockets')}, an answer after {seconds} s: {result}", flush=True)
PY
for release in 14.2 17.4; do
  "${PYTHON:-python3}" -m venv "$work/$release"
  # typing_extensions is not among the client's requirements, and it does not start without.
  "$work/$release/bin/pip" install --quiet openpi-client==0.1.2 openpi-server==0.1.0 websockets==$release \
    numpy==1.26.4 typing_extensions==4.16.0
done
for release in 14.2 17.4; do
  "$work/$release/bin/python" "$work/answer.py" > "$work/$release.txt" 2> "$work/$release.errors" &
done
wait
cat "$work"/*.txt
outcome=$(sed -n 's/.*after 45 s: \([A-Za-z]*Error\|(10, 7)\).*/\1/p' "$work/14.2.txt" "$work/17.4.txt" | paste -sd '|')
echo "seen: an answer after 45 s, with websockets 14.2 and 17.4: ${outcome/|/ and }"
[ "$outcome" = "(10, 7)|ConnectionClosedError" ] && [ "$(grep -c 'after 1 s: (10, 7)' "$work"/*.txt | grep -c ':1$')" = 2 ]
