"""Where data may come from and go to: which directories, hosts and buckets, and in which region they are.

Closed by default: without a file of `SOURCES` there are the tenant's own directory and its own corner of memory. No
credential comes from a request: those of buckets stand in that file. All here blocks, and is called from threads.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote, unquote, urlsplit

import fsspec  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from execution_envelope import InvalidField
from proving_ground.threads import Threads

if TYPE_CHECKING:
    import aiohttp

Scheme = Literal["file", "memory", "http", "https", "s3"]
SCHEMES: Final[tuple[Scheme, ...]] = ("file", "memory", "http", "https", "s3")
#: How much is read at a time, and is in the air beyond what is counted.
CHUNK: Final = 256 * 1024
#: Characters of a path.
MAX_PATH: Final = 1024
#: What all files in memory may come to.
MEMORY_BYTES: Final = 64 * 1024 * 1024
#: What those of one tenant may come to.
MEMORY_SHARE: Final = 32 * 1024 * 1024
#: How long a host or a bucket may be silent.
SILENT_SECONDS: Final = 30.0

#: What stands before a host to say who asks: ``user:password@``, ``//token@``.
_USERINFO: Final = re.compile(r"(?:://|//|:)[^/@]*@")
#: Characters of an address.
_MAX_ADDRESS: Final = 4096
_URN: Final = re.compile(r"urn:li:dataset:\(urn:li:dataPlatform:([a-z0-9]+),([^,()]{1,2048}),([A-Z]{1,16})\)")


class NotAllowed(Exception):
    """A place that is not among those that are configured, or no place at all; names the field."""


class NoRoom(Exception):
    """A place that has filled up since it was asked what room there is."""


class _Host(BaseModel):
    model_config = ConfigDict(extra="forbid")

    scheme: Literal["http", "https"] = "https"
    host: str = Field(pattern=r"^[a-z0-9.-]{1,253}(:[0-9]{1,5})?$")
    region: str | None = Field(default=None, max_length=64)


class _Bucket(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bucket: str = Field(pattern=r"^[a-z0-9.-]{3,63}$")
    endpoint: str | None = None
    key: SecretStr
    secret: SecretStr
    region: str | None = Field(default=None, max_length=64)
    tenants: list[str] = Field(min_length=1, max_length=64)


class _File(BaseModel):
    """The file of `SOURCES`."""

    model_config = ConfigDict(extra="forbid")

    region: str | None = Field(default=None, max_length=64)
    http: list[_Host] = Field(default_factory=list, max_length=64)
    s3: list[_Bucket] = Field(default_factory=list, max_length=64)


@dataclass(frozen=True)
class Place:
    """One file somewhere. `name` is how it is spoken of, `path` what its file system takes; both hold no credential."""

    scheme: Scheme
    name: str
    path: str
    region: str | None
    bucket: _Bucket | None = None

    @property
    def urn(self) -> str:
        """As the catalogue of data sets names it."""
        rest = self.name.split(":", 1)[1].lstrip("/")
        return f"urn:li:dataset:(urn:li:dataPlatform:{self.scheme},{quote(rest)},PROD)"

    @property
    def suffix(self) -> str:
        """``csv``, ``jsonl``: what the name says that it is; empty when it says nothing."""
        return Path(self.name).suffix.lstrip(".").lower()


@dataclass(frozen=True)
class Found:
    """What a source says of itself: bytes, or None; and a stamp that is another one when its content is."""

    size: int | None
    stamp: str


class Sources:
    """All places that the tenants of this backend may read and write, below `root` and as the file at `path` says."""

    def __init__(self, root: Path, path: Path | None = None) -> None:
        self._root = root
        self._file = _File() if path is None else _read(path)
        self.threads = Threads()
        """Where what blocks on a place is called."""
        self._memory = threading.RLock()

    def source(self, tenant: str, source_type: str, kwargs: Mapping[str, Any]) -> Place:
        """The source that an ingestion names. Raises `NotAllowed`."""
        if source_type not in SCHEMES:
            raise NotAllowed(f"expected one of {', '.join(SCHEMES)}, got `{source_type[:32]}` - at source_type")
        if source_type in ("http", "https"):
            return self._url(source_type, _text(kwargs, "url"))
        path = _text(kwargs, "path")
        if source_type == "s3":
            return self._object(tenant, _text(kwargs, "bucket"), path, "kwargs.bucket")
        return self._own(tenant, source_type, path, "kwargs.path")

    def destination(self, tenant: str, written: str) -> Place:
        """Where it goes: ``landing/a.csv`` below the tenant's directory, ``memory://a.csv``, ``s3://bucket/a.csv``."""
        scheme, found, rest = written.partition("://")
        field = "kwargs.destination"
        if not found:
            return self._own(tenant, "file", written, field)
        if scheme == "s3":
            return self._object(tenant, *rest.partition("/")[::2], field)
        if scheme in ("file", "memory"):
            return self._own(tenant, scheme, rest, field)
        raise NotAllowed(f"expected a path, `memory://` or `s3://`, got `{scheme[:32]}://` - at {field}")

    def dataset(self, tenant: str, urn: str) -> Place:
        """The place of a data set. Raises `NotAllowed`."""
        named = _URN.fullmatch(urn)
        if named is None or named[1] not in SCHEMES:
            raise NotAllowed("expected `urn:li:dataset:(urn:li:dataPlatform:PLATFORM,NAME,PROD)` - at dataset_urn")
        scheme, name = named[1], unquote(named[2])
        if scheme in ("http", "https"):
            return self._url(scheme, f"{scheme}://{name}", "dataset_urn")
        if scheme == "s3":
            return self._object(tenant, *name.partition("/")[::2], "dataset_urn")
        return self._own(tenant, scheme, name, "dataset_urn")

    def _own(self, tenant: str, scheme: str, path: str, field: str) -> Place:
        """A file of the tenant's own. Where links lead is looked at when it is opened."""
        _check_path(path, field)
        name, corner = path.strip("/"), quote(tenant, safe="").replace(".", "%2E")
        if scheme == "memory":
            return Place("memory", f"memory://{name}", f"/{corner}/{name}", self._file.region)
        return Place("file", f"file:{name}", str(self._root / corner / name), self._file.region)

    def _url(self, scheme: str, url: str, field: str = "kwargs.url") -> Place:
        check_url(url, field)
        parts = urlsplit(url)
        for known in self._file.http:
            if parts.scheme == scheme == known.scheme and parts.netloc.lower() == known.host:
                _check_path(parts.path, field)
                # Made of the host that is allowed, so that no other reading of the address leads elsewhere.
                safe = f"{scheme}://{known.host}{quote(unquote(parts.path))}"
                return Place(known.scheme, safe, safe, known.region)
        raise NotAllowed(f"expected a {scheme} host that this backend may read from, got another one - at {field}")

    def _object(self, tenant: str, bucket: str, key: str, field: str) -> Place:
        _check_path(key, field)
        for known in self._file.s3:
            if known.bucket == bucket and tenant in known.tenants:
                path = f"{bucket}/{key.lstrip('/')}"
                return Place("s3", f"s3://{path}", path, known.region, known)
        raise NotAllowed(f"expected a bucket that this backend may use for you, got another one - at {field}")

    # What is done with a place

    def found(self, place: Place) -> Found:
        """What is there. Raises `FileNotFoundError`, `PermissionError`, `OSError`, `NotAllowed`."""
        try:
            info = self._system(place).info(self._path(place))
        except FileNotFoundError as error:
            # Over HTTP that is said of everything that fails.
            raise error.__cause__ or error from None
        if info.get("type") == "directory":
            raise FileNotFoundError(f"{place.name} is a directory")
        names = ("size", "mtime", "ino", "created", "ETag", "Last-Modified", "LastModified")
        said = {name: str(info[name]) for name in names if info.get(name) is not None}
        size = info.get("size")
        stamp = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return Found(size if isinstance(size, int) else None, stamp)

    def open(self, place: Place, offset: int, stop: threading.Event) -> IO[bytes]:
        """The bytes from `offset` on, fetched as they are read. Going there ends when `stop` is set."""
        system, path = self._system(place), self._path(place)
        if place.scheme in ("http", "https"):
            ranged = {"headers": {"Range": f"bytes={offset}-"}} if offset else {}
            # One request for all of it; with a size at hand it is not asked for first.
            opened: IO[bytes] = system.open(path, "rb", block_size=0, size=1, **ranged)
        elif place.scheme == "memory":
            # What the file system opens is the one file that all its readers share, with one position.
            opened = io.BytesIO(system.cat_file(path))
        else:
            opened = system.open(path, "rb", block_size=CHUNK, cache_type="none")
        try:
            if place.scheme == "file":
                self._check_opened(opened, place)
            _forward(opened, offset, stop)
        except BaseException:
            opened.close()
            raise
        return opened

    def put(self, staged: Path, place: Place) -> None:
        """Move a whole file to its place, in which it is there at once or not at all. Raises `NoRoom`, `OSError`."""
        if place.scheme == "file":
            path = Path(place.path)
            tenant = self._tenant(place)
            tenant.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Before anything is made there, and once more when it is.
            self._check_below(path, tenant, place)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._check_below(path, tenant, place)
            staged.replace(path)
            return
        if place.scheme == "memory":
            with self._memory:  # others may have filled it since the grant
                room, why = self.room(place)
                if staged.stat().st_size > room:
                    raise NoRoom(f"{room} bytes are left, {why}")
                self._system(place).put_file(str(staged), place.path)
        else:
            self._system(place).put_file(str(staged), place.path)
        staged.unlink()

    def room(self, place: Place) -> tuple[int, str]:
        """How many bytes may come to a place at most, and why: memory is small, and disks are filled to a half."""
        if place.scheme == "memory":
            corner = place.path.split("/")[1]
            with self._memory:
                files = self._system(place).find("/", detail=True)
            # What is there already is replaced.
            sizes = {name: int(one["size"]) for name, one in files.items() if name != place.path}
            left = MEMORY_BYTES - sum(sizes.values())
            share = MEMORY_SHARE - sum(size for name, size in sizes.items() if name.split("/")[1] == corner)
            if share < left:
                return max(0, share), f"the memory for files holds {MEMORY_SHARE} bytes of one tenant"
            return max(0, left), f"the memory for files holds {MEMORY_BYTES} bytes"
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(self._root).free // 2
        return free, f"half of the disk space that is left here, {free} bytes"

    def has(self, place: Place, size: int) -> bool:
        """Whether a file of this size is there."""
        with contextlib.suppress(OSError, NotAllowed):
            return self.found(place).size == size
        return False

    def _check_below(self, path: Path, tenant: Path, place: Place) -> None:
        if not path.parent.resolve().is_relative_to(tenant.resolve()) or path.is_dir():
            raise PermissionError(f"{place.name} is not a file below the directory of its tenant")

    def _tenant(self, place: Place) -> Path:
        return self._root / Path(place.path).relative_to(self._root).parts[0]

    def _path(self, place: Place) -> str:
        """Where links lead to, when that is still below the tenant's directory, and is a plain file."""
        if place.scheme != "file":
            return place.path
        real = Path(place.path).resolve(strict=True)
        if not real.is_relative_to(self._tenant(place).resolve()):
            raise NotAllowed(f"expected a file below the directory of its tenant, `{place.name}` leads out of it")
        if not stat.S_ISREG(real.stat().st_mode):
            raise FileNotFoundError(f"{place.name} is no plain file")
        return str(real)

    def _check_opened(self, opened: IO[bytes], place: Place) -> None:
        """A link may have been put in its place meanwhile: what counts is the file that is open."""
        real = Path(f"/proc/self/fd/{opened.fileno()}").readlink()
        if not real.is_relative_to(self._tenant(place).resolve()):
            raise NotAllowed(f"expected a file below the directory of its tenant, `{place.name}` leads out of it")

    def _system(self, place: Place) -> Any:
        if place.scheme in ("http", "https"):
            return fsspec.filesystem(place.scheme, get_client=_client)
        if place.bucket is not None:
            return fsspec.filesystem(
                "s3",
                key=place.bucket.key.get_secret_value(),
                secret=place.bucket.secret.get_secret_value(),
                endpoint_url=place.bucket.endpoint,
                config_kwargs={"connect_timeout": 5, "read_timeout": SILENT_SECONDS},
                use_listings_cache=False,
            )
        return fsspec.filesystem(place.scheme)


def check_url(url: str, field: str) -> None:
    """Refuse what may hold a credential, before anything is recorded. Raises `InvalidField`, which does not show it."""
    try:
        parts = urlsplit(url)
        bare = not (parts.username or parts.password or parts.query or parts.fragment or "@" in parts.netloc)
        bare = bare and _USERINFO.search(url) is None
    except ValueError:
        bare = False
    if not bare or "?" in url or "#" in url:
        raise InvalidField(field, "expected a URL without credentials, query and fragment")


def check_texts(value: Any, field: str, *, is_url: bool = False) -> None:
    """Refuse every text in a JSON value that is an address which may hold a credential, however often it is encoded.

    `is_url` says that each of them is an address, whatever it looks like. Raises `InvalidField`.
    """
    if isinstance(value, str):
        _check_encoded(value, field, is_url=is_url)
    elif isinstance(value, Mapping):
        check_texts([*value, *value.values()], field, is_url=is_url)
    elif isinstance(value, list):
        for one in value:
            check_texts(one, field, is_url=is_url)


def check_urn(urn: str) -> None:
    """The same for what a data set is called by: one that is none may be an address. Raises `InvalidField`."""
    named = _URN.fullmatch(urn)
    is_file = named is not None and named[1] in SCHEMES and named[1] not in ("http", "https")
    _check_encoded(urn if named is None else named[2], "dataset_urn", is_url=not is_file)


def _check_encoded(text: str, field: str, *, is_url: bool) -> None:
    if len(text) > _MAX_ADDRESS:
        raise InvalidField(field, f"expected up to {_MAX_ADDRESS} characters")
    before = None
    while text != before:
        if is_url or "//" in text or _USERINFO.search(text):
            check_url(text, field)
        before, text = text, unquote(text)


def lines(opened: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, the last one too when nothing ends it."""
    rest = b""
    while part := opened.read(CHUNK):
        *whole, rest = (rest + part).split(b"\n")
        if len(rest) > 16 * CHUNK:
            raise OSError(f"expected lines of up to {16 * CHUNK} bytes")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _read(path: Path) -> _File:
    """What the file says; what is wrong with it is said without showing a secret."""
    try:
        return _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top"
        raise ValueError(f"expected sources, got `{first['msg']}` - at {where} of SOURCES") from None


def _text(kwargs: Mapping[str, Any], name: str) -> str:
    value = kwargs.get(name)
    if not isinstance(value, str) or not value:
        raise NotAllowed(f"expected text, got {'none' if value is None else 'something else'} - at kwargs.{name}")
    return value


def _check_path(path: str, field: str) -> None:
    parts = unquote(path).strip("/").split("/")
    if len(path) > MAX_PATH or not all(parts) or {".", ".."} & set(parts) or not unquote(path).isprintable():
        raise NotAllowed(f"expected a path of up to {MAX_PATH} characters without `..` and empty steps - at {field}")


def _forward(opened: Any, offset: int, stop: threading.Event) -> None:
    """Go on at `offset`, also where the other side can only begin at the beginning."""
    answer = getattr(opened, "r", None)
    if answer is None:
        opened.seek(offset)
    elif answer.status != 206:
        while offset > 0:
            skipped = opened.read(min(CHUNK, offset))
            if not skipped or stop.is_set():
                raise OSError("the source is shorter than it was")
            offset -= len(skipped)
    elif not answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        raise OSError("the source answers another range than it was asked for")


async def _client(**options: Any) -> "aiohttp.ClientSession":
    """HTTP that goes where it is sent and nowhere else: no redirects, no proxies, no other host."""
    import aiohttp  # half a second, which no start of a backend waits for

    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(_refuse_redirect)
    timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=SILENT_SECONDS)
    headers = {"Accept-Encoding": "identity"}
    return aiohttp.ClientSession(trace_configs=[tracing], timeout=timeout, headers=headers, **options)


async def _refuse_redirect(*_: Any) -> None:
    raise PermissionError("the host sends on to another address, which is not followed")
