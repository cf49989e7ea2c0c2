"""The images of requests: what names them, fetching and decoding them, and what a model sees of them."""
