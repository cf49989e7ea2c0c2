"""What the server does when processes die, files are damaged and callers leave."""
