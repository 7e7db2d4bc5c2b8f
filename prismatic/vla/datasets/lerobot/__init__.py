"""LeRobot datasets (codebase versions 2.0, 2.1 and 3.0), read behind the same batches as RLDS."""
