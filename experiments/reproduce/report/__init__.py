"""Pages of results: HTML building blocks and templates, one self-contained file a page."""
