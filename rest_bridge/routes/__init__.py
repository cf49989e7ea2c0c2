"""One blueprint per section of the API document."""
