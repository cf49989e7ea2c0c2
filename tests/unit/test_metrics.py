"""What the server observes of its requests."""

from mlxgui_grpc.metrics import Metrics


def test_time_per_token_is_that_of_decoding_after_the_first() -> None:
    """Neither queue nor load nor prefill are in it; a request of one token has none."""
    metrics = Metrics()
    with metrics.request("m") as request:
        request.ended(11, 100.0, 1.0)
        request.ended(1, 100.0, 0.0)
    _, body = metrics.exposition()
    lines = body.decode().splitlines()
    assert 'mlxgui:time_per_output_token_seconds_sum{model_name="m"} 0.1' in lines
    assert 'mlxgui:time_per_output_token_seconds_count{model_name="m"} 1.0' in lines
