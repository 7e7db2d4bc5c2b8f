"""RoboTwin's convention until July 2026: link this folder as policy/ROCKET of its checkout."""

from .deploy_policy import eval, get_model, reset_model

__all__ = ["eval", "get_model", "reset_model"]
