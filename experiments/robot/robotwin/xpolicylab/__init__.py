"""XPolicyLab's convention, RoboTwin's since August 2026: link this folder as XPolicyLab/policy/ROCKET."""
