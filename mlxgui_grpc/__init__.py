"""The gRPC-first local model server for MLX: control process, workers and command line."""

__version__ = "0.1.0"
