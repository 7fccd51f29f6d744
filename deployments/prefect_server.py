"""``python -m holdfast.deployments.prefect_server DESCRIPTOR``: Prefect's API and UI on a socket that listens already."""

from __future__ import annotations

import gc
import socket
import sys


def main() -> None:
    """Serve until SIGTERM; the database is that of Prefect's settings."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()  # until everything is imported, which stays
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(final=True)
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="on",
        access_log=False,
        # browsers and workers keep connections open
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
