"""Platforms, action tokens and data of vision-language-action training."""
