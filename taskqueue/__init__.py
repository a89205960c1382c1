"""The modules that the scripts share, one subject a file."""
