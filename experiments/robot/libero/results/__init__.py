"""Result folders: reading, checking, merging, comparing, reporting."""
