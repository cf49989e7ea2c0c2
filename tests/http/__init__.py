"""The REST API, asked as its users do, in front of the real program."""
