"""As engine_worker.py, but process 1 cannot answer the probe: first as it prepares to, then while it answers."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import engine_worker

from experiments.robot.openvla_utils import OpenVLAPolicy


def refuse(*_: Any) -> NoReturn:
    raise MemoryError(f"no room in process {os.environ['RANK']}")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        prepare, prepared = OpenVLAPolicy.__init__, iter([refuse])
        OpenVLAPolicy.__init__ = lambda *given: next(prepared, prepare)(*given)  # type: ignore[method-assign]
        OpenVLAPolicy.act = refuse  # type: ignore[method-assign]
    engine_worker.main(*sys.argv[1:])
