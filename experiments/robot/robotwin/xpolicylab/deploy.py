"""The loop of an episode: XPolicyLab's own."""

from XPolicyLab.policy.demo_policy.deploy import eval_one_episode, eval_one_episode_batch

__all__ = ["eval_one_episode", "eval_one_episode_batch"]
