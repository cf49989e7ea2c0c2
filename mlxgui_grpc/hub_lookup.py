"""The child process that asks the model hub what it has: one lookup after the other, without a download.

Started as `python -m mlxgui_grpc.hub_lookup`. It reads jobs as JSON lines from standard input, answers each with a
JSON line on standard output, and ends at once when standard input closes.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import httpx2
from huggingface_hub import HfApi, ModelInfo, get_session, hf_hub_url, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelSort_T
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from mlxgui_grpc import memory
from mlxgui_grpc.hub_child import limit_memory, open_reports, read_jobs
from mlxgui_grpc.hub_failures import as_failure
from mlxgui_grpc.hub_files import WEIGHT_SUFFIXES, is_wanted
from mlxgui_grpc.hub_frames import (
    Described,
    DescribeJob,
    JobError,
    Listed,
    LookupJob,
    Repository,
    SearchJob,
)
from mlxgui_grpc.model_types import POOLING_SIGNS, type_of
from mlxgui_grpc.untrusted_json import mapping

MLX_TAG = "mlx"
MLX_OWNER = "mlx-community"
"""Whose conversions are preferred where several are there."""
MAX_BODY_BYTES = 64 * 1024 * 1024
"""Of one answer of the hub, as it arrives and as it is unpacked."""
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_TAGS = 100
MAX_TEXT_CHARACTERS = 500
MAX_CONVERSIONS = 20

# As the hub lists them; its `usedStorage` counts every old revision and is no size of anything.
_LISTED = [
    "cardData",
    "config",
    "createdAt",
    "downloads",
    "gated",
    "lastModified",
    "library_name",
    "likes",
    "pipeline_tag",
    "safetensors",
    "tags",
]
_ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
}


def main() -> None:
    """Answer the jobs on standard input, in order."""
    limit_memory()
    emit = open_reports()
    client = _Client()
    set_client_factory(lambda: client)
    jobs: queue.SimpleQueue[LookupJob] = queue.SimpleQueue()

    def read() -> None:
        for job in read_jobs():
            assert isinstance(job, SearchJob | DescribeJob)
            jobs.put(job)
        os._exit(0)  # The server is gone, or has done with us.

    threading.Thread(target=read, name="control", daemon=True).start()
    while True:
        job = jobs.get()
        try:
            emit(_look_up(client, job))
        except Exception as error:
            emit(as_failure(error, job))


def _look_up(client: "_Client", job: LookupJob) -> Listed | Described:
    """Ask the hub; raises JobError, or what huggingface_hub raises, which `as_failure` explains."""
    client.begin(job)
    api = HfApi(endpoint=job.endpoint, token=job.token)
    return _search(api, client, job) if isinstance(job, SearchJob) else _describe(api, job)


class _Client(httpx2.Client):
    """Sends requests within the time of their job, and does not insist: the library would repeat a refused connection,
    and wait out a limit, for half a minute. Pages by cursor, which `HfApi.list_models` cannot."""

    def __init__(self) -> None:
        super().__init__(follow_redirects=True, event_hooks={"response": [_bound]})
        self._deadline = 0.0
        self._cursor = ""
        self.next_cursor = ""

    def begin(self, job: LookupJob) -> None:
        """What is sent from now on belongs to this job."""
        self._deadline = time.monotonic() + job.time_limit_seconds
        self._cursor = job.cursor if isinstance(job, SearchJob) else ""
        self.next_cursor = ""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        left_seconds = max(0.01, self._deadline - time.monotonic())
        request.extensions["timeout"] = httpx2.Timeout(left_seconds).as_dict()
        if self._cursor:
            request.url = request.url.copy_merge_params({"cursor": self._cursor})
        options["stream"] = True
        try:
            try:
                response = self._whole(super().send(request, **options))
            except (
                httpx2.RemoteProtocolError
            ):  # A connection kept from an earlier job, which the hub has just ended.
                response = self._whole(super().send(request, **options))
        except httpx2.TimeoutException as error:
            raise JobError(
                "HUB_UNAVAILABLE", f"The hub at {_shown(request)} did not answer in time; try again later."
            ) from error
        except httpx2.HTTPError as error:
            raise JobError(
                "HUB_UNAVAILABLE",
                f"The hub at {_shown(request)} cannot be reached ({type(error).__name__}); check the network or "
                "HF_ENDPOINT.",
            ) from error
        hf_raise_for_status(response)
        # Only the cursor is taken of the link, which the library would follow, token and all, wherever it points.
        link = response.links.get("next", {}).get("url", "")
        self.next_cursor = parse_qs(urlsplit(link).query).get("cursor", [""])[0]
        response.headers.pop("link", None)
        return response

    def _whole(self, response: httpx2.Response) -> httpx2.Response:
        """The response with its content, which the library would read whatever its size; raises JobError."""
        content = bytearray()
        try:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_BODY_BYTES:
                    raise _too_large(response.request)
                if time.monotonic() > self._deadline:
                    raise httpx2.ReadTimeout("The answer came too slowly.", request=response.request)
        finally:
            response.close()
        headers = response.headers.copy()
        for name in ("content-encoding", "content-length", "transfer-encoding"):
            headers.pop(name, None)
        return httpx2.Response(
            response.status_code,
            headers=headers,
            content=bytes(content),
            request=response.request,
            history=response.history,
        )


class _Bounded(httpx2.SyncByteStream):
    """The bytes of a response as they arrive: so many and no more."""

    def __init__(self, response: httpx2.Response) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        self._stream = response.stream
        self._request = response.request

    def __iter__(self) -> Iterator[bytes]:
        byte_count = 0
        for chunk in self._stream:
            byte_count += len(chunk)
            if byte_count > MAX_BODY_BYTES:
                raise _too_large(self._request)
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _bound(response: httpx2.Response) -> None:
    response.stream = _Bounded(response)
    if (
        response.has_redirect_location
    ):  # The client reads it to its end, and nobody looks at it: it stays packed.
        response.headers.pop("content-encoding", None)


def _too_large(request: httpx2.Request) -> JobError:
    return JobError(
        "HUB_UNAVAILABLE",
        f"The hub at {_shown(request)} answered with more than {MAX_BODY_BYTES >> 20} MiB, which is no list of models; "
        "check HF_ENDPOINT and proxies.",
    )


def _shown(request: httpx2.Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc.decode().rpartition('@')[2]}"


def _search(api: HfApi, client: _Client, job: SearchJob) -> Listed:
    assert job.sort in get_args(ModelSort_T), job.sort
    sort: Any = job.sort
    expand: Any = _LISTED
    found = api.list_models(
        search=job.words or None, filter=job.tags, sort=sort, limit=job.limit, expand=expand
    )
    repositories = [_repository(info) for info in found]
    return Listed(repositories, client.next_cursor if repositories else "")


def _describe(api: HfApi, job: DescribeJob) -> Described:
    info = api.model_info(job.model_id, files_metadata=True)
    config = _read_config(info, job)
    weight_files = [
        sibling
        for sibling in info.siblings or []
        if is_wanted(sibling.rfilename) and sibling.rfilename.endswith(tuple(WEIGHT_SUFFIXES))
    ]
    sizes = [sibling.lfs.size if sibling.lfs else sibling.size for sibling in weight_files]
    known = [size for size in sizes if isinstance(size, int) and size >= 0]
    repository = _repository(
        info,
        config,
        weight_file_bytes=sum(known) if known and len(known) == len(sizes) else None,
        mlx_repository="" if MLX_TAG in (info.tags or []) else _find_conversion(api, info.id),
    )
    return Described(repository)


def _read_config(info: ModelInfo, job: DescribeJob) -> Mapping[str, Any]:
    """The repository's config.json; empty where there is none, or where the hub wants a licence accepted first."""
    if not any(sibling.rfilename == "config.json" for sibling in info.siblings or []):
        return {}
    url = hf_hub_url(info.id, "config.json", revision=info.sha, endpoint=job.endpoint)
    try:
        response = get_session().get(url, headers=build_hf_headers(token=job.token))
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            return {}
        raise
    if len(response.content) > MAX_CONFIG_BYTES:
        return {}
    try:
        return mapping(json.loads(response.content))
    except (ValueError, RecursionError):
        return {}


def _find_conversion(api: HfApi, model_id: str) -> str:
    """Hub id of a repository that was made from this one for MLX; empty: there is none."""
    found = list(
        api.list_models(filter=[MLX_TAG, f"base_model:{model_id}"], sort="downloads", limit=MAX_CONVERSIONS)
    )
    found.sort(key=lambda info: not info.id.startswith(f"{MLX_OWNER}/"))  # Else as they come: by downloads.
    return _clip(found[0].id) if found else ""


def _repository(
    info: ModelInfo,
    config: Mapping[str, Any] | None = None,
    *,
    weight_file_bytes: int | None = None,
    mlx_repository: str = "",
) -> Repository:
    """What the hub's answer says; nothing in it is to be trusted. `config` replaces the digest of config.json."""
    digest = {**mapping(info.config), **(config or {})}
    text_config = mapping(digest.get("text_config"))
    card = mapping(vars(info.card_data) if info.card_data is not None else None)
    quantization = mapping(digest.get("quantization_config") or digest.get("quantization"))
    architecture = _clip(digest.get("model_type"))
    names = {sibling.rfilename.partition("/")[0] for sibling in info.siblings or []}
    type = type_of(
        architecture, digest, has_pooling=not names.isdisjoint(POOLING_SIGNS), repository=_clip(info.id)
    )
    tags = [_clip(tag) for tag in _texts(info.tags)][:MAX_TAGS]
    context_length = digest.get("max_position_embeddings") or text_config.get("max_position_embeddings")
    return Repository(
        id=_clip(info.id),
        downloads=_count(info.downloads),
        likes=_count(info.likes),
        tags=tags,
        pipeline_tag=_clip(info.pipeline_tag),
        library_name=_clip(info.library_name),
        create_time=_unix_seconds(info.created_at),
        update_time=_unix_seconds(info.last_modified),
        is_gated=bool(info.gated),
        base_model=_base_model(card),
        card_description=_clip(card.get("description")),
        architecture=architecture,
        type=type if config or type != "text" else "",
        quantization_bits=_count(quantization.get("bits")),
        quantization_method=_clip(quantization.get("quant_method")),
        has_safetensors=info.safetensors is not None or "safetensors" in tags,
        tensor_bytes=_tensor_bytes(info),
        weight_file_bytes=weight_file_bytes,
        kv_bytes_per_token=memory.kv_bytes_per_token(digest),
        context_length=_count(context_length),
        mlx_repository=mlx_repository,
    )


def _tensor_bytes(info: ModelInfo) -> int | None:
    """Bytes by the hub's count of elements of each type; None where a type is none that we know the size of."""
    parameters = mapping(info.safetensors.parameters if info.safetensors is not None else None)
    bits = 0
    for element, count in parameters.items():
        if element not in _ELEMENT_BITS or not isinstance(count, int) or not 0 <= count < 2**53:
            return None
        bits += _ELEMENT_BITS[element] * count
    return bits // 8 if bits else None


def _base_model(card: Mapping[str, Any]) -> str:
    base = card.get("base_model")
    first = base[0] if isinstance(base, list) and base else base
    return _clip(first) if isinstance(first, str) and first.count("/") == 1 else ""


def _texts(value: Any) -> Sequence[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _clip(text: Any) -> str:
    """Printable text on one line, of bounded length; what is no text is empty. It ends up on terminals."""
    if not isinstance(text, str):
        return ""
    words = " ".join(text[: 4 * MAX_TEXT_CHARACTERS].split())
    return "".join(filter(str.isprintable, words))[:MAX_TEXT_CHARACTERS]


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _unix_seconds(value: datetime | None) -> float | None:
    return value.timestamp() if value is not None else None


if __name__ == "__main__":
    main()
