"""The secrets that come by environment, and an environment without them for child processes."""

from collections.abc import Mapping

HUB_TOKENS = ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""Both documented names; huggingface_hub itself reads only the first."""
API_KEY = "MLX_GUI_API_KEY"


def hub_token(environ: Mapping[str, str]) -> str | None:
    """The token for the model hub, if there is one. Never logged or stored."""
    return next((token for name in HUB_TOKENS if (token := environ.get(name, "").strip())), None)


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """What a child process gets: it has no use for keys of ours."""
    hidden = {*HUB_TOKENS, "HUGGING_FACE_HUB_TOKEN", API_KEY}
    return {name: value for name, value in environ.items() if name not in hidden}
