"""The command line: `app` is its grammar; the other modules do the work, imported when it comes to that."""
