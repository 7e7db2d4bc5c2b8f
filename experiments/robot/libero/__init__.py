"""LIBERO: the simulator and the evaluation on it."""
