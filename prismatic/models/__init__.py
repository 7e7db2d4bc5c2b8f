"""Modules beside the vision-language model: action heads, projectors, FiLM, LoRA."""
