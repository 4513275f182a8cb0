"""Who may ask `/early_exit/` anything, and who may change anything there.

| the server has | reads | changes, and sees all tenants |
|---|---|---|
| an admin key | holders of an API key, each its own tenant; without API keys this machine | holders of the admin key |
| API keys, no admin key | holders of an API key, each its own tenant | holders of an API key on this machine |
| no key | this machine | this machine |

"This machine" is the peer of the socket: a loopback address, or a Unix socket, to which only those can connect whom
its file lets. What headers say of it counts for nothing, but one that a proxy leaves says that the peer is the
proxy: without an admin key such a request is refused.
"""

import asyncio
import ipaddress
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from apparate_llm.admin import digest_of

MAX_BODY_BYTES = 64 * 1024
BODY_TIMEOUT_S = 60.0  # a client on a busy machine may get no core for seconds between headers and body
BODY_WAITS = 10
PROXY_HEADERS = (
    "forwarded",
    "via",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-original-forwarded-for",
    "true-client-ip",
    "cf-connecting-ip",
    "fastly-client-ip",
)
PROXY_PREFIXES = ("x-forwarded-", "x-envoy-")
ASK_FOR_ADMIN_KEY = {"WWW-Authenticate": 'Bearer realm="admin"'}  # the page asks for it where it finds this


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who sent a request to `/early_exit/`."""

    who: str  # for the log
    may_change: bool  # and sees all tenants
    key_digest: str | None = None  # of its API key


class Access:
    def __init__(self, keys: Sequence[str], admin_keys_sha256: Sequence[str] = ()) -> None:
        self._keys = [digest_of(key) for key in keys]
        self._admin_keys = list(admin_keys_sha256)

    @property
    def has_keys(self) -> bool:
        return bool(self._keys or self._admin_keys)

    @property
    def has_admin_key(self) -> bool:
        return bool(self._admin_keys)

    def check(self, request: Request) -> Visitor:
        """Raises HTTPException 401 for a missing or wrong key, 403 for a stranger where there is no key."""
        self.refuse_proxies(request)
        key = bearer_key(request.headers)
        digest = digest_of(key) if key else ""
        peer = peer_of(request)
        if _is_among(digest, self._admin_keys):
            return Visitor(f"admin key {digest[:8]} from {peer}", may_change=True)
        if _is_among(digest, self._keys):
            may_change = not self.has_admin_key and is_local(request)
            return Visitor(f"API key {digest[:8]} from {peer}", may_change, digest)
        if self._keys or (self.has_admin_key and (key or not is_local(request))):
            wanted = "API key" if self._keys else "admin key"
            problem = f"wrong {wanted}" if key else f"no {wanted} given"
            raise HTTPException(401, f"{problem}: send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        check_local(request)
        return Visitor(f"this machine, {peer}", may_change=not self.has_admin_key)

    def check_change(self, visitor: Visitor) -> None:
        """Raises HTTPException 401 or 403 for one who may only read."""
        if visitor.may_change:
            return
        if not self.has_admin_key:
            raise HTTPException(
                403, "without an admin key only this machine may change anything; start the server with --admin-key KEY"
            )
        status = 401 if visitor.key_digest is None else 403
        raise HTTPException(status, "only the admin key may change anything", ASK_FOR_ADMIN_KEY)

    def check_page(self, request: Request) -> None:
        """The page by itself has nothing of the server in it, and asks for the key."""
        self.refuse_proxies(request)
        if not self.has_keys:
            check_local(request)

    def refuse_proxies(self, request: Request) -> None:
        """uvicorn takes the client's address from a header where its peer is trusted, as this machine is: what a
        request says of itself can be told from the peer of the socket by the header only."""
        if not self.has_admin_key and (name := proxy_header(request.headers)):
            raise HTTPException(
                403,
                f"this request came through a proxy ({name}): behind one, start the server with --admin-key KEY",
            )


def bearer_key(headers: Headers) -> str:
    """The key of `Authorization: Bearer KEY`; empty where there is none."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def proxy_header(headers: Headers) -> str | None:
    """A header that proxies add, if there is one."""
    return next((name for name in headers if name in PROXY_HEADERS or name.startswith(PROXY_PREFIXES)), None)


def check_local(request: Request) -> None:
    """Raises HTTPException 403 unless this machine asks, and not for a page of another site that its browser shows;
    400 for headers that cannot be read."""
    if not is_local(request):
        raise HTTPException(403, "without an API key only this machine may ask; start the server with --api-key KEY")
    hosts, origins = request.headers.getlist("Host"), request.headers.getlist("Origin")
    if len(hosts) > 1 or len(origins) > 1:
        raise HTTPException(400, "more than one Host or Origin header")
    host = hosts[0] if hosts else ""
    name = _host_name(host)
    if not (name in ("", "localhost") or name.endswith(".localhost") or _address(name)):
        raise HTTPException(403, f"without an API key this is served as localhost only, not as {name}")
    if origins and _netloc(origins[0]) != host:
        raise HTTPException(403, f"without an API key pages of other sites may not ask, got Origin: {origins[0]}")


def is_local(request: Request) -> bool:
    """Whether the peer of the socket is on this machine and no proxy. The commonest proxy adds no header of its own,
    but asks in HTTP/1.0."""
    if proxy_header(request.headers) or request.scope.get("http_version") == "1.0":
        return False
    if request.client is None:
        return _is_unix_socket(request)
    address = _address(request.client.host)
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, on a socket that listens for both
    return address is not None and (mapped or address).is_loopback


def peer_of(request: Request) -> str:
    return request.client.host if request.client else "a Unix socket" if _is_unix_socket(request) else "nowhere known"


def _is_unix_socket(request: Request) -> bool:
    """Its server address is a path and has no port."""
    path, port = request.scope.get("server") or ("", 0)
    return request.client is None and bool(path) and port is None


def _is_among(digest: str, digests: Sequence[str]) -> bool:
    matches = [secrets.compare_digest(digest, one) for one in digests]
    return bool(digest) and any(matches)


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        raise HTTPException(400, "malformed Host header") from None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


async def read_object(request: Request) -> dict[str, object]:
    """The request's body, a JSON object; raises HTTPException 413, 408 or 400."""
    reading = asyncio.ensure_future(_read(request))
    try:
        for _ in range(BODY_WAITS):  # a server that stood still has waited once, and hears what came meanwhile
            if (await asyncio.wait([reading], timeout=BODY_TIMEOUT_S / BODY_WAITS))[0]:
                break
        else:
            raise HTTPException(408, f"the body did not come within {BODY_TIMEOUT_S:g} s")
        body = reading.result()
    except ClientDisconnect:
        raise HTTPException(400, "the body did not come to its end") from None
    finally:
        reading.cancel()
    try:
        document = json.loads(body)
    except RecursionError:
        raise HTTPException(400, "not valid JSON: nested too deeply") from None
    except ValueError as error:  # no UTF-8 is one, too
        raise HTTPException(400, f"not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise HTTPException(400, f"must be a JSON object, got {type(document).__name__}")
    return document


async def _read(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a body may have {MAX_BODY_BYTES} bytes at most")
    return body
