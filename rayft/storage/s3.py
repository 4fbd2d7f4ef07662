"""S3 and everything that speaks its protocol, through boto3.

Large objects go up as parallel multipart uploads and come down as parallel ranges; retries are our own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rayft.errors import StorageError
from rayft.storage import s3_errors
from rayft.storage.kept_checksum import KeptChecksum, of_answer
from rayft.storage.local import LocalStore
from rayft.storage.retry import RetryPolicy, with_retries
from rayft.storage.store import (
    DamagedObject,
    Data,
    Entries,
    Entry,
    Keys,
    ObjectChanged,
    ObjectNotFound,
    Store,
    checked_key,
    truncated,
)

T = TypeVar("T")
S = TypeVar("S")

PART_BYTES = 16 << 20  # AWS advises 8 to 16 MiB a part
MAX_PARTS = 10_000  # limit of the protocol
PARALLEL = 8  # requests in flight per large object
_DELETE_BATCH = 1000  # limit of the protocol
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60


class S3Store(Store):
    """Objects below `s3://bucket/prefix`.

    Objects above `part_bytes` travel in parts, `parallel` of them at once: an upload holds at most their
    product in memory beside the caller's data.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        retry: RetryPolicy | None = None,
        part_bytes: int = PART_BYTES,
        parallel: int = PARALLEL,
    ) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.retry = retry or RetryPolicy()
        self.part_bytes, self.parallel = part_bytes, parallel
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None
        self._client_lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., S3Store], tuple[Any, ...]]:
        return _rebuild, (self.bucket, self.prefix, self.retry, self.part_bytes, self.parallel)

    @property
    def client(self) -> Any:
        """The boto3 client, made at first use."""
        with self._client_lock:
            if self._client is None:
                self._client = _make_client(self.parallel)
            return self._client

    def child(self, *parts: str) -> S3Store:
        name = self._name(checked_key("/".join(parts)))
        store = _rebuild(self.bucket, name, self.retry, self.part_bytes, self.parallel)
        store._client = self.client
        return store

    def put_parts(self, key: str, parts: Sequence[Data]) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        total = sum(map(len, views))
        if total <= self.part_bytes:
            self._request("Writing", key, "put_object", Body=b"".join(views))
            return
        part_bytes = self._part_bytes(total)
        joined = _Joined(views)
        starts = range(0, total, part_bytes)
        self._put_multipart(key, total, [partial(joined.slice, at, part_bytes) for at in starts])

    def put_if_absent(self, key: str, data: Data) -> bool:
        from botocore.exceptions import ClientError

        body = bytes(data)

        def create(attempt: int) -> bool:
            try:
                self.client.put_object(**self._at(key), Body=body, IfNoneMatch="*")
            except ClientError as error:
                if s3_errors.code_and_status(error)[1] != 412:
                    raise
                # After a lost response the object found may be our own.
                return attempt > 1 and self.get(key) == body
            return True

        return self._call("Creating", key, create)

    def get(self, key: str) -> bytes:
        def fetch(_: int) -> bytes:
            return self.client.get_object(**self._at(key))["Body"].read()

        return self._call("Reading", key, fetch)

    def read_into(self, key: str, start: int, out: memoryview) -> None:
        out = out.cast("B")
        pieces = [(at, out[at : at + self.part_bytes]) for at in range(0, len(out), self.part_bytes)]
        self._parallel(lambda piece: self._read_piece(key, start + piece[0], piece[1]), pieces)

    def read_piece(self, entry: Entry, start: int, out: memoryview) -> None:
        self._read_piece(entry.key, start, out.cast("B"), entry.version)

    def kept_checksum(self, entry: Entry) -> KeptChecksum | None:
        head = self._request("Looking at", entry.key, "head_object", ChecksumMode="ENABLED")
        if _version(head) != entry.version:
            raise self._changed(entry.key)
        found = of_answer(head, entry.version)
        if found is None or "-" not in found.value:
            return found
        part = self._request("Looking at", entry.key, "head_object", PartNumber=1)
        parts, part_bytes = int(found.value.rpartition("-")[2]), part["ContentLength"]
        if -(-entry.size // max(part_bytes, 1)) != parts:
            return None  # parts of several sizes, or a service that does not tell them
        return replace(found, part_bytes=part_bytes)

    def upload(self, path: Path, key: str) -> None:
        file, name = LocalStore(path.absolute().parent), path.name
        size = file.size(name)
        if size <= self.part_bytes:
            self.put(key, file.get(name))
            return
        part_bytes = self._part_bytes(size)

        def part(at: int) -> bytearray:
            out = bytearray(min(part_bytes, size - at))
            file.read_into(name, at, memoryview(out))
            return out

        self._put_multipart(key, size, [partial(part, at) for at in range(0, size, part_bytes)])

    def download(self, key: str, path: Path) -> None:
        size = self.size(key)
        window = self.part_bytes * self.parallel

        def blocks() -> Iterator[bytearray]:
            for at in range(0, size, window):
                block = bytearray(min(window, size - at))
                self.read_into(key, at, memoryview(block))
                yield block

        LocalStore(path.absolute().parent).put_parts(path.name, blocks())

    def copy_from(self, source: Store, source_key: str, key: str) -> None:
        """`Store.copy_from`; between buckets the service copies."""
        if not isinstance(source, S3Store):
            super().copy_from(source, source_key, key)
            return
        size, there = source.size(source_key), source._at(source_key)
        doing = f"Copying {source.where(source_key)} to"
        if size <= self.part_bytes:
            self._request(doing, key, "copy_object", CopySource=there)
            return
        part_bytes = self._part_bytes(size)

        def send(upload_id: str, number: int) -> dict[str, Any]:
            first = (number - 1) * part_bytes
            last = min(first + part_bytes, size) - 1
            sent: dict[str, Any] = self._request(
                doing,
                key,
                "upload_part_copy",
                UploadId=upload_id,
                PartNumber=number,
                CopySource=there,
                CopySourceRange=f"bytes={first}-{last}",
            )["CopyPartResult"]
            return sent

        self._multipart(key, size, -(-size // part_bytes), send)

    def list(self, prefix: str = "") -> Entries:
        pages = self._pages(
            "Listing", "list_objects_v2", prefix, {"ContinuationToken": "NextContinuationToken"}
        )
        items = [item for page in pages for item in page.get("Contents", [])]
        entries = [Entry(self._key(item["Key"]), item["Size"], _version(item)) for item in items]
        return sorted(entries, key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        try:
            head = self._request("Looking at", key, "head_object")
        except ObjectNotFound:
            return None
        return Entry(key, head["ContentLength"], _version(head))

    def delete(self, keys: Iterable[str]) -> None:
        names = [self._name(checked_key(key)) for key in keys]
        for at in range(0, len(names), _DELETE_BATCH):
            self._delete_batch(names[at : at + _DELETE_BATCH])

    def discard_unfinished(self, prefix: str, dead: Callable[[str], bool]) -> Keys:
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        pages = self._pages("Listing the uploads of", "list_multipart_uploads", prefix, markers)
        uploads = [
            (self._key(item["Key"]), item["UploadId"]) for page in pages for item in page.get("Uploads", [])
        ]
        dead_uploads = [(key, upload_id) for key, upload_id in uploads if dead(key)]
        for key, upload_id in dead_uploads:
            self._abort(key, upload_id)
        return [key for key, _ in dead_uploads]

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _key(self, name: str) -> str:
        return name[len(self.prefix) + 1 :] if self.prefix else name

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._name(checked_key(key))}

    def _part_bytes(self, total: int) -> int:
        return max(self.part_bytes, -(-total // MAX_PARTS))

    def _call(self, doing: str, key: str, call: Callable[[int], T]) -> T:
        operation = f"{doing} {self.where(key)}"
        try:
            return with_retries(
                operation, call, fatal=s3_errors.fatal, policy=self.retry, describe=s3_errors.describe
            )
        except StorageError as error:
            if s3_errors.is_damage(error.__cause__):
                raise DamagedObject(
                    error.message, "Use an earlier checkpoint, or restore the object."
                ) from error
            raise

    def _request(self, doing: str, key: str, method: str, **arguments: Any) -> Any:
        return self._call(doing, key, lambda _: getattr(self.client, method)(**self._at(key), **arguments))

    def _pages(self, doing: str, method: str, prefix: str, following: dict[str, str]) -> Iterator[Any]:
        """Every page of a listing of the folder `prefix`; `following`: argument -> field of the page before."""
        folder = self._name(checked_key(prefix)) if prefix else self.prefix
        arguments = {"Bucket": self.bucket, "Prefix": folder and folder + "/"}
        while True:
            page = self._call(doing, prefix, partial(self._page, method, dict(arguments)))
            yield page
            if not page.get("IsTruncated"):
                return
            arguments |= {argument: page[field] for argument, field in following.items()}

    def _page(self, method: str, arguments: dict[str, str], _attempt: int) -> Any:
        return getattr(self.client, method)(**arguments)

    def _parallel(self, call: Callable[[S], T], items: Sequence[S]) -> Sequence[T]:
        """`call` on every item, `self.parallel` at once; the first failure cancels what has not started."""
        if len(items) <= 1:
            return [call(item) for item in items]
        with ThreadPoolExecutor(min(self.parallel, len(items)), "rayft-s3") as pool:
            futures = [pool.submit(call, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _read_piece(self, key: str, start: int, out: memoryview, version: str = "") -> None:
        """One range. With `version` only of that one, and an answer that is too short is no end of the object."""
        from botocore.exceptions import ClientError

        only = {"IfMatch": f'"{version}"'} if version else {}

        def fetch(_: int) -> None:
            try:
                response = self.client.get_object(
                    **self._at(key), Range=f"bytes={start}-{start + len(out) - 1}", **only
                )
            except ClientError as error:
                status = s3_errors.code_and_status(error)[1]
                if status == 412 or (version and status == 416):
                    raise self._changed(key) from error
                if status == 416:
                    raise truncated(self.where(key), start, len(out), 0) from error
                raise
            got = response["ContentLength"]
            if got != len(out):
                if version:
                    raise s3_errors.Passing(f"{got} bytes instead of {len(out)} from offset {start}")
                raise truncated(self.where(key), start, len(out), got)
            body, done = response["Body"], 0
            while done < len(out):
                count = body.readinto(out[done:])  # raises where the body ends before its length
                if not count:
                    raise s3_errors.Passing(f"the body ended after {done} of {len(out)} bytes")
                done += count

        self._call("Reading", key, fetch)

    def _changed(self, key: str) -> ObjectChanged:
        return ObjectChanged(f"{self.where(key)} was overwritten while it was read.", "Start again.")

    def _put_multipart(self, key: str, total: int, parts: Sequence[Callable[[], Data]]) -> None:
        """Upload the parts that the callables give; the object appears when all are there, or not at all."""

        def send(upload_id: str, number: int) -> dict[str, Any]:
            sent: dict[str, Any] = self._request(
                "Writing", key, "upload_part", UploadId=upload_id, PartNumber=number, Body=parts[number - 1]()
            )
            return sent

        self._multipart(key, total, len(parts), send)

    def _multipart(
        self, key: str, total: int, count: int, send: Callable[[str, int], dict[str, Any]]
    ) -> None:
        """Have `send(upload, number)` bring the parts 1 to `count`, in parallel, and put them together."""
        upload_id = self._request("Writing", key, "create_multipart_upload")["UploadId"]

        def bring(number: int) -> dict[str, Any]:
            sent = send(upload_id, number)
            checksums = {
                name: sent[name] for name in sent if name.startswith("Checksum") and name != "ChecksumType"
            }
            return {"PartNumber": number, "ETag": sent["ETag"], **checksums}

        try:
            sent = self._parallel(bring, range(1, count + 1))
            self._call("Writing", key, lambda attempt: self._complete(key, upload_id, sent, total, attempt))
        except BaseException:
            self._abort(key, upload_id)
            raise

    def _complete(
        self, key: str, upload_id: str, sent: Sequence[dict[str, Any]], total: int, attempt: int
    ) -> None:
        from botocore.exceptions import ClientError

        try:
            self.client.complete_multipart_upload(
                **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": list(sent)}
            )
        except ClientError as error:
            # An earlier attempt may have completed it and lost its response.
            if attempt == 1 or s3_errors.code_and_status(error)[0] != "NoSuchUpload":
                raise
            entry = self.stat(key)
            if entry is None or entry.size != total:
                raise

    def _abort(self, key: str, upload_id: str) -> None:
        """Best effort: the error that led here matters more, and `discard_unfinished` comes by later."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.abort_multipart_upload(**self._at(key), UploadId=upload_id)
        except (BotoCoreError, ClientError):
            return

    def _delete_batch(self, names: Sequence[str]) -> None:
        request = {"Objects": [{"Key": name} for name in names], "Quiet": True}

        def delete(_: int) -> None:
            answer = self.client.delete_objects(Bucket=self.bucket, Delete=request)
            for failure in answer.get("Errors", []):
                if failure["Code"] in s3_errors.RETRY_CODES:
                    raise s3_errors.Passing(f"{failure['Code']} for {failure['Key']}")
                if failure["Code"] != "NoSuchKey":
                    raise StorageError(
                        f"Deleting s3://{self.bucket}/{failure['Key']} failed: {failure['Code']}.",
                        "Give these credentials delete on the bucket.",
                    )

        self._call("Deleting below", "", delete)


class _Joined:
    """Buffers addressed as if they were one, without joining them."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views

    def slice(self, start: int, length: int) -> bytes:
        pieces = []
        for view in self._views:
            if start < len(view):
                pieces.append(view[start : start + length])
                length -= len(pieces[-1])
            start = max(0, start - len(view))
        return b"".join(pieces)


def _version(fields: dict[str, Any]) -> str:
    return str(fields.get("ETag", "")).strip('"')


def _rebuild(bucket: str, prefix: str, retry: RetryPolicy, part_bytes: int, parallel: int) -> S3Store:
    return S3Store(bucket, prefix, retry=retry, part_bytes=part_bytes, parallel=parallel)


def _make_client(parallel: int) -> Any:
    """A client whose own retries are off, because ours are bounded in time and explained."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=8 * parallel,  # several large objects at once, each in parallel
        tcp_keepalive=True,
    )
    return boto3.session.Session().client("s3", config=config)
