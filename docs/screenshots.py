"""Take the pictures of docs/img: what is deployed, a search that died and was restored, and the forms, as a browser shows them.

``python docs/screenshots.py [NAME...]`` starts a Prefect server, a worker and a headless Chromium, in a temporary folder and on
free ports, and takes about three minutes. With names only those pictures are written.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent / "tests"))
    from support_tour import main

    sys.exit(main(HERE / "img", sys.argv[1:]))
