"""The REST bridge: the documented HTTP API and OpenAI's, translated to `mlxgui.v1` over gRPC."""
