"""`python -m tests.provider --folder DIR [--port P]`: prints its URL once it listens, and serves until it is ended."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from tests.provider import VIDEO
from tests.provider.footage import Footage, parse_video
from tests.provider.server import listen
from tests.provider.shop import Shop


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.provider", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where videos are kept")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--video", default=VIDEO, help="WIDTHxHEIGHT,FRAMES,FPS")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does")
    options = parser.parse_args()
    server = listen(Shop(Footage(options.folder, parse_video(options.video))), options.port)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    if options.until_eof:
        threading.Thread(target=_end_with_input, daemon=True).start()
    server.serve_forever()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
