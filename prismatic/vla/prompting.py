"""The words around an instruction, the same in training and in rollouts."""

from __future__ import annotations


def action_prompt(instruction: str) -> str:
    """OpenVLA's question for an instruction (lower-cased); the action tokens follow after it.

    The tokenized prompt must be followed by the lone word-boundary token (id 29871) before the first action token.
    """
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"
