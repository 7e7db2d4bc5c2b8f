"""Datasets of robot episodes: RLDS files read with NumPy, random access to frames, exact shuffling."""
