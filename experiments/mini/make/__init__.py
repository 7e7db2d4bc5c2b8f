"""The makers of the mini models' weights."""
