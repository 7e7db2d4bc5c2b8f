"""From a plan of episodes to their results."""
