"""Checkpoint folders: the one place that knows what they hold, for training, acting, merging and publishing."""
