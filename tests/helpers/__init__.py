"""Shared by tests: files, models and fakes."""
