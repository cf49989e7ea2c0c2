"""Side-by-side benchmark of the server, its peers and mlx-lm's own limit; run it with ``python -m bench``."""
