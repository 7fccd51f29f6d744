"""How often each client, or each hook, may call: a bucket of tokens for each, and a bounded number of buckets."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class RateLimit:
    """At most ``times`` within ``seconds`` for each name, in bursts as large; of too many names the oldest is forgotten."""

    def __init__(self, times: int, seconds: float, *, most: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._times, self._each, self._most, self._clock = float(times), seconds / times, most, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str) -> float:
        """Return 0 when the name may go on, else the seconds until it may; one that was refused pays nothing."""
        with self._lock:
            now = self._clock()
            left, since = self._buckets.pop(name, (self._times, now))
            left = min(self._times, left + (now - since) / self._each)
            allowed = left >= 1.0
            self._buckets[name] = (left - 1.0 if allowed else left, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
            return 0.0 if allowed else (1.0 - left) * self._each

    def __len__(self) -> int:
        return len(self._buckets)


def client_name(host: str | None) -> str:
    """Return what a client is counted as: its address, of IPv6 the network, which one client owns as a whole."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False).network_address)
    return str(address)
