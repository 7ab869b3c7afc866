"""`python -m control_plane`: the control plane until it is interrupted or terminated."""

from __future__ import annotations

import argparse
import signal
import threading
from types import FrameType

from control_plane import ControlPlane, Settings

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m control_plane", description="SageMaker, its runtime and Service Quotas on this machine."
    )
    parser.add_argument("--port", type=int, default=4567, help="port to listen on; 0 is any free one (default: %(default)s)")
    parser.add_argument("--aws-url", default="http://127.0.0.1:4566", help="where S3 and Logs are (default: %(default)s)")
    parser.add_argument("--region", default="us-east-1", help="region of the quotas that are set (default: %(default)s)")
    parser.add_argument("--runner", choices=["docker", "process", "none"], default="docker", help="what jobs run in (default: %(default)s)")
    parser.add_argument("--work", help="folder for what jobs need while they run (default: a temporary one)")
    parser.add_argument("--hub", help="folder of <model id>.json: what JumpStart's public hub is to have")
    parser.add_argument("--volumes", action="store_true", default=None, help="volumes in place of folders, as where you are not root")
    parser.add_argument("command", nargs="*", help="with --runner process: the command of a job, after --")
    asked = parser.parse_args()
    over = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        """The first signal ends it in order, the second one at once."""
        over.set()
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)

    for each in ENDING:
        signal.signal(each, end)
    runner = None if asked.runner == "none" else asked.runner
    settings = Settings(volumes=asked.volumes)
    with ControlPlane(
        asked.aws_url, runner, asked.command, port=asked.port, region=asked.region, work=asked.work, settings=settings, hub=asked.hub
    ) as plane:
        print(f"control plane: {plane.url}", flush=True)
        over.wait()


if __name__ == "__main__":
    main()
