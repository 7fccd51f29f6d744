"""The first process of a host: sets its file systems and name up, says so, and ends the host when its starter is gone.

Run as ``unshare --net --uts --ipc --pid --mount --fork python host_init.py NAME HOSTS KEPT...``: HOSTS are the lines of its
``/etc/hosts``, KEPT the folders that all hosts see where they lie under a folder that each has for itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

OWN = ("/tmp", "/dev/shm", "/var/tmp", "/run")
"""What a host shares with nobody."""
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
LIBC = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    if LIBC.mount(*words, ctypes.c_ulong(flags), None if data is None else data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} at {target}: {os.strerror(number)}")


def main() -> None:
    name, hosts, *kept = sys.argv[1:]
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc")
    hidden = [path for path in kept if path.startswith(tuple(f"{folder}/" for folder in OWN))]
    handles = {path: os.open(path, os.O_PATH) for path in hidden}
    for folder in OWN:
        if os.path.isdir(folder):
            mount("tmpfs", folder, "tmpfs", data="size=1500m")
            os.chmod(folder, 0o1777)
    for path, handle in handles.items():
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", path, flags=MS_BIND | MS_REC)
        os.close(handle)
    for folder in ("/tmp/home", "/tmp/work"):
        os.mkdir(folder)
    with open("/tmp/hosts", "w") as file:
        file.write(hosts)
    mount("/tmp/hosts", "/etc/hosts", flags=MS_BIND)
    socket.sethostname(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whom nobody waits for is no zombie
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    os.read(0, 1)  # the end of the starter; with this process every other one of the host ends


if __name__ == "__main__":
    main()
