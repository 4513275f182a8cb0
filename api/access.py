"""Who may ask `/early_exit/` anything: holders of the server's API key; without one, this machine only."""

import asyncio
import hashlib
import ipaddress
import json
import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

MAX_BODY_BYTES = 64 * 1024
BODY_TIMEOUT_S = 60.0  # a client on a busy machine may get no core for seconds between headers and body
BODY_WAITS = 10


class Access:
    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @property
    def has_keys(self) -> bool:
        return bool(self._digests)

    def check(self, request: Request) -> None:
        """Raises HTTPException 401 for a missing or wrong key, 403 for a stranger where there is no key."""
        if not self._digests:
            check_local(request)
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        digest = _digest(given)
        known = [secrets.compare_digest(digest, own) for own in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            said = "wrong API key" if given else "no API key given"
            raise HTTPException(401, f"{said}: send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})


def check_local(request: Request) -> None:
    """Raises HTTPException 403 unless this machine asks, and not for a page of another site that its browser shows."""
    if not _is_local(request):
        raise HTTPException(403, "without an API key only this machine may ask; start the server with --api-key KEY")
    host = request.headers.get("Host", "")
    name = urlsplit(f"//{host}").hostname or ""
    if not (name in ("", "localhost") or name.endswith(".localhost") or _is_address(name)):
        raise HTTPException(403, f"without an API key this is served as localhost only, not as {name}")
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise HTTPException(403, f"without an API key pages of other sites may not ask, got Origin: {origin}")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_local(request: Request) -> bool:
    if request.client is None:  # a Unix socket
        return True
    return _is_address(request.client.host) and ipaddress.ip_address(request.client.host).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_object(request: Request) -> dict[str, Any]:
    """The request's body, a JSON object; raises HTTPException 413, 408 or 400."""
    reading = asyncio.ensure_future(_read(request))
    try:
        for _ in range(BODY_WAITS):  # a server that stood still has waited once, and hears what came meanwhile
            if (await asyncio.wait([reading], timeout=BODY_TIMEOUT_S / BODY_WAITS))[0]:
                break
        else:
            raise HTTPException(408, f"the body did not come within {BODY_TIMEOUT_S:g} s")
        body = reading.result()
    finally:
        reading.cancel()
    try:
        found = json.loads(body)
    except ValueError as error:  # no UTF-8 is one, too
        raise HTTPException(400, f"not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise HTTPException(400, f"must be a JSON object, got {type(found).__name__}")
    return found


async def _read(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a body may have {MAX_BODY_BYTES} bytes at most")
    return body
