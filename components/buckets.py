"""Buckets: one place for the settings, clients and errors of S3 and of what speaks like it.

Settings are the AWS_* variables of the environment, so that boto3, pyarrow, Ray Train and every worker go by the same;
:func:`use` fills in those that are missing from the run's config. Credentials come from where AWS's own tools find
them (variables, ~/.aws, the machine's or the pod's role) and are never passed on.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from components.config import S3Settings

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

SCHEME = "s3://"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # the first that is set counts; so for all of these
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
PROFILES = ("AWS_DEFAULT_PROFILE", "AWS_PROFILE")
ATTEMPTS = ("AWS_MAX_ATTEMPTS",)
PASSED_ON = (  # to processes on other nodes; nothing secret is among them
    *ENDPOINTS, *REGIONS, *PROFILES, *ATTEMPTS, "AWS_RETRY_MODE", "AWS_CA_BUNDLE", "AWS_EC2_METADATA_DISABLED"
)  # fmt: skip
CONNECT_S, READ_S = 10, 60  # a server that says nothing for so long is asked again
PART_BYTES = 256 << 20  # of a copy; S3 copies at most 5 GiB in one request
COPIES = 16  # at once
REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
FORBIDDEN = {"AccessDenied", "AllAccessDisabled", "Forbidden", "403"}
GONE = {"NoSuchKey", "NotFound", "404"}
CHANGED = {"PreconditionFailed", "412"}


class BucketError(ValueError):
    """A bucket can't be used as it is asked for: its name, the endpoint, or the credentials are wrong."""


@dataclass(frozen=True)
class _Settings:
    endpoint: str | None
    region: str | None
    profile: str | None
    attempts: int
    mode: str
    key_id: str | None  # a client goes on with the credentials that it began with; other ones need another


def use(settings: S3Settings) -> None:
    """Let ``settings`` count in this process and those it starts, where the environment says nothing."""
    given = {ENDPOINTS: settings.endpoint_url, REGIONS: settings.region, PROFILES: settings.profile}
    for names, value in (*given.items(), (ATTEMPTS, str(settings.max_attempts))):
        if value is not None and _first(names) is None:
            os.environ[names[-1]] = value


def environment() -> dict[str, str]:
    """The variables that processes on other nodes need in order to find the same buckets; no secrets."""
    return {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}


def is_bucket(uri: str) -> bool:
    """Whether ``uri`` is an address in a bucket."""
    return uri.startswith(SCHEME)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; raises BucketError."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not is_bucket(uri) or not bucket:
        raise BucketError(f"{uri!r}: s3://BUCKET/PREFIX is needed")
    return bucket, key.strip("/")


def client() -> Any:
    """boto3's S3 client of this process. Throttling and 5xx are tried again, with backoff; raises BucketError."""
    return _client(_settings())


def filesystem(bucket: str) -> "S3FileSystem":
    """pyarrow's file system for ``bucket``, with the same endpoint, region and number of attempts."""
    return _filesystem(_settings(), bucket)


def check(uri: str, field: str) -> None:
    """Whether ``uri`` can be listed; raises BucketError with ``field``, the address and what is wrong, in one line.

    Where a later try may succeed it is a ConnectionError.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        bucket, prefix = split(uri)
        client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", MaxKeys=1)
    except (BotoCoreError, ClientError, BucketError) as error:
        kind = ConnectionError if is_passing(error) else BucketError
        raise kind(f"{field} {uri!r}: {reason(error)}") from error


def copy(paths: Mapping[str, str]) -> None:
    """Each ``bucket/key`` to another, within S3, large objects in parts, as S3 needs it; raises OSError."""
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=False)

    def copy_one(pair: tuple[str, str]) -> None:
        (bucket, _, key), (to_bucket, _, to_key) = (path.partition("/") for path in pair)
        client().copy({"Bucket": bucket, "Key": key}, to_bucket, to_key, Config=parts)

    with _as_os_error("copying within a bucket"), ThreadPoolExecutor(COPIES) as pool:
        for _ in pool.map(copy_one, paths.items()):
            pass


@dataclass(frozen=True)
class Upload:
    """One in parts that is neither completed nor aborted."""

    bucket: str
    key: str
    upload_id: str
    initiated: datetime

    @property
    def bytes(self) -> int:
        """Of the parts that have arrived."""
        with _as_os_error("listing an upload's parts"):
            pages = client().get_paginator("list_parts").paginate(**self._place)
            return sum(part["Size"] for page in pages for part in page.get("Parts", ()))

    def abort(self) -> None:
        """Let S3 drop the parts; nothing happens where it is over by now. Raises OSError."""
        with _as_os_error("aborting an upload"), suppress(client().exceptions.NoSuchUpload):
            client().abort_multipart_upload(**self._place)

    @property
    def _place(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key, "UploadId": self.upload_id}


def unfinished_uploads(uri: str) -> Iterator[Upload]:
    """Those of keys below ``uri``; raises PermissionError when they may not be listed, or OSError."""
    bucket, prefix = split(uri)
    with _as_os_error(f"listing unfinished uploads below {uri}"):
        pages = client().get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}/" if prefix else ""):
            for one in page.get("Uploads", ()):
                yield Upload(bucket, one["Key"], one["UploadId"], one["Initiated"])


@contextmanager
def _as_os_error(doing: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        refused = code(error) in FORBIDDEN | {"NotImplemented"}
        kind = ConnectionError if is_passing(error) else PermissionError if refused else OSError
        raise kind(f"{doing}: {reason(error)}") from error


def code(error: Exception) -> str:
    """S3's own word for what went wrong; empty where S3 did not answer."""
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def is_passing(error: Exception) -> bool:
    """Whether a later try may succeed: the server is down, overloaded, or the network failed."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
    )

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or code(error) in {"SlowDown", "RequestTimeout", "Throttling"}
    lasting = NoCredentialsError | PartialCredentialsError | ParamValidationError  # the last: no name of a bucket
    return isinstance(error, BotoCoreError) and not isinstance(error, lasting)


def reason(error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    name, said = code(error), " ".join(str(error).split())
    message = str(getattr(error, "response", {}).get("Error", {}).get("Message", ""))
    told = f"{name}: {message}" if message and name != message else name
    endpoint = _settings_or_none()
    where = endpoint.endpoint if endpoint and endpoint.endpoint else "AWS"
    if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}:
        return f"no credentials ({said}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if name in REFUSED:
        return f"{where} refuses the credentials ({told})"
    if name in FORBIDDEN:
        return f"these credentials have no permission for it ({told})"
    if name == "NoSuchBucket":
        return f"there is no such bucket at {where}"
    return told or said


def attempts() -> int:
    """How often a request is tried."""
    return _settings().attempts


def broken_bodies() -> tuple[type[Exception], ...]:
    """What reading an answer to its end can raise when it is slow, cut or damaged."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    return BotoCoreError, HTTPError, OSError


def _first(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _settings() -> _Settings:
    attempts = _first(ATTEMPTS) or str(S3Settings().max_attempts)
    if not attempts.isdigit() or attempts == "0":
        raise BucketError(f"AWS_MAX_ATTEMPTS = {attempts!r}: a number of at least 1 is needed")
    mode = os.environ.get("AWS_RETRY_MODE") or "standard"
    return _from_profile(
        _first(ENDPOINTS), _first(REGIONS), _first(PROFILES), int(attempts), mode, os.environ.get("AWS_ACCESS_KEY_ID")
    )


def _settings_or_none() -> _Settings | None:
    try:
        return _settings()
    except BucketError:
        return None


@lru_cache
def _from_profile(endpoint: str | None, region: str | None, profile: str | None, *others: Any) -> _Settings:
    """What the environment leaves open as ~/.aws/config has it; pyarrow would not look for an endpoint there."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        config = Session(profile=profile).get_scoped_config()
    except BotoCoreError as error:
        raise BucketError(f"AWS_PROFILE (s3.profile) = {profile!r}: {error}") from error
    return _Settings(endpoint or config.get("endpoint_url"), region or config.get("region"), profile, *others)


@lru_cache
def _client(settings: _Settings) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        max_pool_connections=64,
        retries={"mode": settings.mode, "total_max_attempts": settings.attempts},
        s3={"addressing_style": "path" if settings.endpoint else "auto"},
    )
    try:
        return boto3.Session().client("s3", endpoint_url=settings.endpoint, region_name=settings.region, config=config)
    except ValueError as error:
        raise BucketError(f"AWS_ENDPOINT_URL (s3.endpoint_url) = {settings.endpoint!r}: {error}") from error


@lru_cache
def _filesystem(settings: _Settings, bucket: str) -> "S3FileSystem":
    from pyarrow import fs

    region = settings.region
    if region is None and settings.endpoint is None:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        endpoint_override=settings.endpoint,
        region=region or "us-east-1",
        connect_timeout=CONNECT_S,
        request_timeout=READ_S,
        allow_delayed_open=True,  # a small object is one request, not the three of a multipart upload
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=settings.attempts),
    )
