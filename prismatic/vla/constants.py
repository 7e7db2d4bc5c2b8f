"""Upstream's names for token ids and for the numbers of the default platform (LIBERO).

Code that may meet another platform takes them from a :class:`prismatic.vla.platforms.Platform` instead.
"""

from __future__ import annotations

from prismatic.vla.platforms import LIBERO, NormalizationType  # noqa: F401 - upstream's code has it from here

# Label value that losses and masks skip.
IGNORE_INDEX = -100
# Llama's end-of-sequence token "</s>".
STOP_INDEX = 2
# The lone word-boundary token that Llama's tokenizer puts between "Out:" and the first action token.
EMPTY_TOKEN_ID = 29871
# Label ids above this one are action tokens, for the vocabulary of 32000 tokens and 256 bins (32000 - 257).
ACTION_TOKEN_BEGIN_IDX = 31743

NUM_ACTIONS_CHUNK = LIBERO.chunk
ACTION_DIM = LIBERO.action_dim
PROPRIO_DIM = LIBERO.proprio_dim
ACTION_PROPRIO_NORMALIZATION_TYPE = LIBERO.normalization
