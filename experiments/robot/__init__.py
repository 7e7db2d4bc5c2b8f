"""Robots: from a checkpoint to a policy that acts."""
