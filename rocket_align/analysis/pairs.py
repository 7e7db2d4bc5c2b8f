"""From selected blocks to layer pairs in the numbering of the alignment. Imports no torch.

A selected block is aligned at its output. For the student that is hidden state block + 1, as the released selection
script prints it (its uniform 8 of 32 are 4, 8, ..., 32); for the teacher it is the block's own number (2, 5, ..., 23
of 24). "e2m_last1" is the paper's recipe instead: the same early numbers on both sides (student states 2, 4, ..., 18,
outputs of blocks 1, 3, ...), then the student's last state but one and the teacher's last block, as released.
"""

from __future__ import annotations

from collections.abc import Sequence

from rocket_align.analysis.selection import select_layers
from rocket_align.recipes import paper_pairs


def student_states(blocks: Sequence[int]) -> tuple[int, ...]:
    """Hidden states that are the outputs of these 0-based blocks."""
    return tuple(block + 1 for block in blocks)


def layers_by_position(
    strategy: str, side: str, *, num_student_layers: int, num_teacher_layers: int, count: int
) -> tuple[int, ...]:
    """Layers of one `side`, "student" or "teacher", chosen by a strategy that needs no measurement.

    Raises:
        ValueError: more layers than the shallower model has, or what `select_layers` refuses.
    """
    shallow = min(num_student_layers, num_teacher_layers)
    if not 1 <= count <= shallow:
        raise ValueError(f"count: found {count}; accepted: 1 to {shallow} pairs")
    if strategy == "e2m_last1":
        pairs = paper_pairs(num_student_layers, num_teacher_layers, count)
        if len(pairs[0]) < count:
            raise ValueError(f"count: found {count}; accepted with e2m_last1: 1 to {len(pairs[0])}")
        return pairs[0] if side == "student" else pairs[1]
    depth = num_student_layers if side == "student" else num_teacher_layers
    blocks = select_layers(strategy, num_layers=depth, count=count)
    return student_states(blocks) if side == "student" else blocks
