"""The paper's tables and figures, one shell script each, at mini scale or with the published settings."""
