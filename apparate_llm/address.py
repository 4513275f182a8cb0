"""Where a server is and the key it wants, as its clients are told."""

import argparse
import os

from apparate_llm.config import ConfigError


def server_url(text: str, flag: str) -> str:
    """The address without `/v1`, which clients of OpenAI's API have at its end; raises ConfigError."""
    import httpx

    url = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{flag}: {text}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or " " in url:
        raise ConfigError(f"{flag} must be http://HOST:PORT or https://HOST:PORT, with or without /v1, got {text}")
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise ConfigError(f"{flag}: a port is 1 to 65535, got {text}")
    return url


def add_api_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        help="API key of the servers that are asked (default: $OPENAI_API_KEY)",
    )


def authorization(api_key: str | None) -> dict[str, str]:
    """HTTP headers."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
