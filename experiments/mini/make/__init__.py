"""How the mini models' weights were made."""
