"""Code in the layout that other libraries expect."""
