"""s3fs with what stores need of it: an object in one request, dates that are read quickly, and no reply without
bound."""

import contextlib
import time
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.utils import parse_timestamp
from fsspec.asyn import sync

from hsae.cache.storage.paths import IN_FLIGHT
from hsae.cache.storage.remote import MOST_BYTES, MOST_LISTED, Backend, RemotePath, read_all

MOST_SKEW = 300.0  # seconds that S3's clock and this machine's may differ


class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
    """Reads listings and errors, which botocore reads whole, up to a limit."""

    async def send(self, request: Any) -> Any:
        """The answer to a request; the body of an object is left to who reads it."""
        streamed, request.stream_output = request.stream_output, True
        answer = await super().send(request)
        if not streamed or answer.status_code >= 300:
            async with answer.raw:
                answer._content = await read_all(answer.raw.content.read, MOST_BYTES)
        return answer


class S3Backend(Backend):
    """Stores at s3:// URLs: an object is published by one PUT (multipart above 100 MB, which appears at its end too).

    Endpoint, profile, region and credentials come from the usual AWS places (AWS_ENDPOINT_URL, AWS_PROFILE, ~/.aws).
    """

    lists_by_prefix = True

    def open(self, url: str) -> tuple[Any, str]:
        """s3fs with one GET an object, without a HEAD first; retries are ours."""
        import fsspec

        settings = {"max_pool_connections": 2 * IN_FLIGHT, "retries": {"total_max_attempts": 1}}
        settings |= {"connect_timeout": 10, "read_timeout": 60, "http_session_cls": BoundedSession}
        options = {"use_listings_cache": False, "max_concurrency": 1, "config_kwargs": settings}
        filesystem, path = fsspec.core.url_to_fs(url, **options)
        filesystem.retries = 1
        if filesystem.session is None:
            filesystem.session = _session(filesystem.kwargs)
        return filesystem, path

    def read(self, filesystem: Any, path: str, most: int) -> bytes:
        """An object's bytes, by one GET. Raises TooLongError if more than `most` come."""

        async def read() -> bytes:
            bucket, key, version = filesystem.split_path(path)
            versions = {"VersionId": version} if version else {}
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **versions)
            async with answer["Body"] as body:
                return await read_all(body.read, most)

        return sync(filesystem.loop, read)  # type: ignore[no-any-return]

    def describe(self, error: Exception) -> str:
        """An error in one line; where this machine's clock is wrong, that: a refused HEAD has no words of its own."""
        line = super().describe(error)
        date = _answer(error).get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        with contextlib.suppress(TypeError, ValueError):
            behind = parsedate_to_datetime(date).timestamp() - time.time()
            if abs(behind) > MOST_SKEW:
                side = "behind" if behind > 0 else "ahead of"
                return f"{line}: this machine's clock is {abs(behind) / 60:.0f} minutes {side} the server's; set it"
        return line

    def lacks_bucket(self, error: FileNotFoundError) -> bool:
        """Whether S3 says so."""
        return bool(_answer(error).get("Error", {}).get("Code") == "NoSuchBucket")

    def sizes(self, target: RemotePath, prefix: str) -> dict[str, int]:
        """By pages of a listing: s3fs's own `find` takes a time quadratic in the number of folders."""
        lengths: dict[str, int] = {}
        token = ""

        def page(filesystem: Any, path: str) -> tuple[dict[str, Any], int]:
            bucket, key, _ = filesystem.split_path(path)
            more = {"ContinuationToken": token} if token else {}
            wanted = {"Bucket": bucket, "Prefix": f"{key}/{prefix}", **filesystem.req_kw, **more}
            return filesystem.call_s3("list_objects_v2", **wanted), len(key) + 1

        while True:
            content, start = target.request(page)
            lengths.update({item["Key"][start:]: int(item["Size"]) for item in content.get("Contents", ())})
            if len(lengths) > MOST_LISTED or content.get("NextContinuationToken") == token:
                raise target.refuse_endless("objects")
            if not content.get("IsTruncated"):
                return lengths
            token = content["NextContinuationToken"]


def _answer(error: Exception) -> dict[str, Any]:
    """What S3 answered with an error, as botocore reads it; empty if it did not answer."""
    return getattr(error.__cause__, "response", None) or {}


def _session(settings: dict[str, Any]) -> Any:
    """An AWS session as s3fs makes it, but quick at reading dates, most of the work of a long listing."""

    def read(text: Any) -> datetime:
        try:
            return datetime.fromisoformat(text)
        except (TypeError, ValueError):
            return parse_timestamp(text)  # type: ignore[no-any-return]

    made = AioSession(**settings)
    made.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=read)
    return made
