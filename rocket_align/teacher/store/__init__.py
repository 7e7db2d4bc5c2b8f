"""Teacher features of a data set, computed once: un-augmented views on a grid a little finer than the student's.

codec.py (features to codes and back, with the crop of an augmented view), layout.py (what a store says of itself),
writer.py, reader.py. A store is a folder:

    index.json             teacher, layers, grids, number format, how much of the features survives
    basis.safetensors      per layer: mean and, when channels are reduced, the directions kept
    DATASET/index.json     the data set's fingerprint and the shards, once all of them are there
    DATASET/frames.npy     frame numbers within the data set, ascending, one per record
    DATASET/features-00000-of-00007.safetensors
"""

from __future__ import annotations
