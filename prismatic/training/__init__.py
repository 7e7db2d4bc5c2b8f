"""Training: objectives, the trainable module, schedules, checkpoints and the loop."""
