"""The server that all files of this folder share, and plain vLLM beside it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import TINY_FLAGS

Serve = Callable[..., AbstractContextManager[str]]

# For the first request with logprobs vLLM compiles a function: 20 s alone, more than a minute beside other tests.
NOT_COMPILED = {"TORCH_COMPILE_DISABLE": "1"}


@pytest.fixture(scope="package")
def server(
    serve: Serve, tiny_llama: Path, lens_ramps: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Started with settings in every way that vLLM takes them."""
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text("served-model-name: tiny\naccuracy_bound: 0.5\nadditional-config: {theirs: {x: 1}}\n")
    flags = ["--config", str(file), "--ramps", str(lens_ramps(depth=3)), "--policy=static"]
    flags += ["--enable-scale-out"]  # the route that takes tokens
    flags += ["--additional-config.early_exit.threshold", "0.05", "--additional_config.theirs.y=2"]
    with serve(str(tiny_llama), *flags, *TINY_FLAGS, **NOT_COMPILED) as base_url:
        yield base_url


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


@pytest.fixture(scope="package")
def plain_server(serve: Serve, tiny_llama: Path) -> Iterator[str]:
    with serve(str(tiny_llama), "--policy", "off", *TINY_FLAGS, **NOT_COMPILED) as base_url:
        yield base_url
