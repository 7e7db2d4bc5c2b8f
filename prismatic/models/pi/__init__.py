"""pi0 and pi0.5: one policy class for both, its checkpoints, images, prompts and normalization."""
