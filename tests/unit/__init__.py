"""Pure parts, without a server."""
