"""The client processes: each reads orders on stdin, plays the clients, and prints figures as JSON lines."""
