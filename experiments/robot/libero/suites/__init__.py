"""Suites of tasks: LIBERO's own, LIBERO-PRO's and LIBERO-Plus's."""
