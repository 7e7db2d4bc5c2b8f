"""RoboTwin 2.0: its demonstrations as training data, and checkpoints in both of its evaluation conventions."""
