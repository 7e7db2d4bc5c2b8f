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
        policy: Any = OpenVLAPolicy
        prepare, prepared = policy.__init__, iter([refuse])
        policy.__init__ = lambda *given: next(prepared, prepare)(*given)
        policy.act = refuse
    engine_worker.main(*sys.argv[1:])
