"""The gRPC services of the real server."""
