"""What is asked of fsspec, one request a call where that can be had, and what its answers mean.

The calls that are left out are those with traps: a file object that is closed by an error publishes
the half that was written; a listing that is kept hides what others write; a listing before each
deletion.
"""

import base64
import errno
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shards.addresses import hidden, without_secrets
from shards.errors import UserError, WrongPlace, how_to_install, one_line

OF_BUCKETS = ("s3:", "s3a:", "gs:", "gcs:", "abfs:", "abfss:", "az:", "oss:")
ONE_PUT_BYTES = 256 << 20  # an object of less is one request
DELETED_AT_ONCE = 1000  # names in one request of S3

NO_BUCKET = "NoSuchBucket"
# Codes of S3 that pass, though their status says that the request was wrong.
PASSING_CODES = {
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"),
    *("ConditionalRequestConflict", "OperationAborted", "RequestLimitExceeded", "Throttling"),
}
# Of a body that ended too early, or was reset: aiohttp gives some of them a status, 400.
CUT_BODIES = {
    *("ContentLengthError", "TransferEncodingError", "ClientPayloadError", "IncompleteReadError"),
}
PASSING_STATUS = {408, 409, 425, 429}
NOT_PASSING = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError)
# Of packages that are not imported here: botocore's, aiohttp's, fsspec's and gcsfs's.
PASSING_KINDS = {
    *("HTTPClientError", "ConnectionError", "ResponseParserError", "ClientConnectionError"),
    *("ServerDisconnectedError", "FSTimeoutError", "HttpError"),
}


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a store says of an object without its bytes. sha256: None where it does not tell."""

    n_bytes: int
    sha256: str | None = None


# ----------------------------------------------------------------------------------------- answers


def status_of(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the code of S3 that an error was made from; None and "" without."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, Mapping):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return (int(code) if status is None and code.isdecimal() else status), code
        for name in ("status", "code"):  # aiohttp's, gcsfs's
            status = getattr(each, name, None)
            if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()):
                return int(status), ""
    return None, ""


def passes(error: BaseException) -> bool:
    """Whether another try may be answered otherwise."""
    if _kinds(error) & CUT_BODIES or _kinds(error.__cause__) & CUT_BODIES:
        return True
    status, code = status_of(error)
    if code in PASSING_CODES:
        return True
    if status is not None:
        return status >= 500 or status in PASSING_STATUS
    if isinstance(error, NOT_PASSING):
        return False
    is_passing = bool(_kinds(error) & PASSING_KINDS)
    return is_passing or isinstance(error, OSError | EOFError | TimeoutError)


def _kinds(error: BaseException | None) -> set[str]:
    """The names of its classes, as they are of packages that are not imported here."""
    return {kind.__name__ for kind in type(error).__mro__}


def is_beyond_the_end(error: BaseException) -> bool:
    """Whether a range was asked for that begins behind an object's last byte."""
    status, code = status_of(error)
    return status == 416 or code == "InvalidRange"


def is_conflict(error: BaseException) -> bool:
    """Whether a store that was to create an object found one there."""
    status, code = status_of(error)
    return isinstance(error, FileExistsError) or status == 412 or code == "PreconditionFailed"


def described(error: BaseException) -> str:
    """What the store answered, in one line."""
    status, code = status_of(error)
    answer = " ".join(str(part) for part in (status, code) if part and str(status) != part)
    text = one_line(error)
    return f"{answer or type(error).__name__}: {text}"


# ---------------------------------------------------------------------------------------- requests


class Backend:
    """The requests of one file system of fsspec. What they raise is that one's own."""

    def __init__(self, files: Any) -> None:
        """files: the file system, of this process."""
        self._files = files
        known = inspect.signature(_own_put(files)).parameters
        self._can_create = "mode" in known
        self._size_of_parts = {"chunksize": ONE_PUT_BYTES // 2} if "chunksize" in known else {}

    @property
    def puts_whole(self) -> bool:
        """Whether it has a way to write an object that never shows a half of it."""
        from fsspec.asyn import AsyncFileSystem
        from fsspec.spec import AbstractFileSystem

        halves = (AbstractFileSystem.pipe_file, getattr(AsyncFileSystem, "_pipe_file"))  # noqa: B009
        return getattr(_own_put(self._files), "__func__", None) not in halves

    def head(self, path: str) -> StoredObject | None:
        """None where there is no object."""
        try:
            found = self._files.info(path)
        except FileNotFoundError:
            return None
        is_object = found.get("type") == "file"
        return StoredObject(int(found["size"])) if is_object else None

    def put(self, path: str, data: bytes, sha256: str, *, is_new: bool) -> None:
        """Write an object whole. is_new: never over another one, as far as the store knows how.

        Raises FileExistsError, or what `is_conflict` says is one.
        """
        how = dict(self._size_of_parts) | self._checked(data, sha256)
        if is_new and self._can_create:
            how["mode"] = "create"
        elif is_new and self.head(path) is not None:
            raise FileExistsError(errno.EEXIST, "is there already", path)
        self._files.pipe_file(path, data, **how)

    def _checked(self, data: bytes, sha256: str) -> dict[str, Any]:
        """What has the store check the bytes that arrive."""
        return {}

    def get(self, path: str, start: int, stop: int) -> bytes:
        """The bytes start .. stop, or up to the end. Raises FileNotFoundError."""
        found: bytes = self._files.cat_file(path, start=start, end=stop)
        return found

    def delete(self, paths: Sequence[str]) -> None:
        """Where there is none, nothing happens."""
        for path in paths:
            try:
                self._files.rm_file(path)
            except FileNotFoundError:
                continue

    def find(self, path: str) -> dict[str, int]:
        """The bytes of every object under a folder, by its name in there."""
        try:
            found = self._files.find(path, detail=True)
        except FileNotFoundError as error:
            if status_of(error)[1] == NO_BUCKET:
                raise
            return {}
        before = f"{path.rstrip('/')}/"
        return {
            name.removeprefix(before): int(each["size"])
            for name, each in found.items()
            if name.startswith(before) and each["type"] == "file"
        }

    def names_in(self, path: str) -> list[str]:
        """The folders and objects directly in a folder."""
        try:
            found = self._files.ls(path, detail=True)
        except FileNotFoundError as error:
            if status_of(error)[1] == NO_BUCKET:
                raise
            return []
        return sorted(each["name"].rstrip("/").rpartition("/")[2] for each in found)


class S3Backend(Backend):
    """S3 and what answers as it does, through s3fs: SHA-256 kept with each object, names deleted a
    thousand at a time.
    """

    def __init__(self, files: Any) -> None:
        super().__init__(files)
        files.retries = 1  # botocore tries again, and so does who calls: not all three

    def head(self, path: str) -> StoredObject | None:
        bucket, key, _ = self._files.split_path(path)
        try:
            found = self._files.call_s3(
                "head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED"
            )
        except FileNotFoundError:
            return None
        checksum = found.get("ChecksumSHA256")
        is_whole = found.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        sha256 = _as_hex(checksum) if checksum and is_whole and "-" not in checksum else None
        return StoredObject(int(found["ContentLength"]), sha256)

    def _checked(self, data: bytes, sha256: str) -> dict[str, Any]:
        if len(data) >= ONE_PUT_BYTES:  # in parts: S3 has no SHA-256 of the whole then
            return {}
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": checksum}

    def delete(self, paths: Sequence[str]) -> None:
        for first in range(0, len(paths), DELETED_AT_ONCE):
            split = [self._files.split_path(path) for path in paths[first:][:DELETED_AT_ONCE]]
            keys = [{"Key": key} for _, key, _ in split]
            answer = self._files.call_s3(
                "delete_objects", Bucket=split[0][0], Delete={"Objects": keys, "Quiet": True}
            )
            for wrong in answer.get("Errors", []):
                raise _refused_deletion(wrong)


def _refused_deletion(answer: Mapping[str, str]) -> OSError:
    text = json.dumps(dict(answer))
    if answer.get("Code") == "AccessDenied":
        return PermissionError(errno.EACCES, text)
    return OSError(errno.EIO, text)


def _as_hex(checksum: str) -> str | None:
    try:
        return base64.b64decode(checksum, validate=True).hex()
    except ValueError:
        return None


def _own_put(files: Any) -> Any:
    """The method that says what it can do: s3fs and its like wrap theirs."""
    return getattr(files, "_pipe_file", files.pipe_file)


# ----------------------------------------------------------------------------------------- opening


def open_backend(address: str) -> tuple[Backend, str]:
    """Of this process, and the path that the address has in it.

    Raises UserError where a package is absent, WrongPlace where nothing is known by such addresses.
    """
    shown = without_secrets(address)
    if shown != address and address.startswith(OF_BUCKETS):
        what = "had a password in front: it would be taken for a part of the bucket's name"
        raise WrongPlace(shown, what, "Give credentials as the store's own tools take them")
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{shown} needs fsspec", _how_to_install(address)) from None
    try:
        files, path = url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(f"{shown}: {one_line(error)}", _how_to_install(address)) from None
    except ValueError as error:
        what = hidden(one_line(error), address)
        raise WrongPlace(shown, f"cannot be opened ({what})", "Check how it begins") from None
    if not path.strip("/") and not address.startswith("memory:"):
        raise WrongPlace(shown, "names no bucket", "Give one, as in s3://bucket/sets")
    is_s3 = hasattr(files, "call_s3")
    return (S3Backend if is_s3 else Backend)(files), path.rstrip("/")


def _how_to_install(address: str) -> str:
    scheme = address.partition("://")[0]
    if scheme in ("s3", "s3a"):
        return how_to_install("s3", "s3fs")
    if scheme in ("memory", "http", "https"):
        return how_to_install("remote", "fsspec[http]")
    return ""


def joined(parts: Iterable[Any]) -> bytes:
    """Buffers one behind the other; bytes by themselves are not copied."""
    found = list(parts)
    if len(found) == 1 and isinstance(found[0], bytes):
        return found[0]
    return b"".join(found)
