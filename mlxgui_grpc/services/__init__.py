"""One servicer per service of the contract: convert, call, relay."""
