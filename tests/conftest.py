import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

    from tests.fake_hub import Hub

# Before vLLM is imported: engines live in the test's own process, nothing is looked up outside, kernels are vLLM's
# own, and servers use this machine as vLLM does by itself, unless a test asks for something else.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    APPARATE_TUNING="off",
    APPARATE_KERNELS="stock",
)


ONE_SERVER = "tests/e2e/server/"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadFileScheduling | None":
    """One worker gets all files of the folder that shares a server: two workers would start it twice."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    scheduling = LoadFileScheduling(config, log)
    file_of = scheduling._split_scope
    scheduling._split_scope = lambda test: ONE_SERVER if test.startswith(ONE_SERVER) else file_of(test)
    return scheduling


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first, or one worker waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_prepare.py" or item.path.parent.name != "engine")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model type -> folder of a tiny random model."""
    from tests.tiny import MODEL_TYPES, build_tiny_model

    root = tmp_path_factory.mktemp("models")
    return {model_type: build_tiny_model(root / model_type, model_type=model_type) for model_type in MODEL_TYPES}


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def lens_ramps(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(model type, depth) -> lens ramp folder; depth 4 is a perfect ramp, 3 agrees now and then."""
    from tests.tiny import build_lens_ramps

    root = tmp_path_factory.mktemp("ramps")
    made: dict[tuple[str, int], Path] = {}

    def get(model_type: str = "llama", depth: int = 3) -> Path:
        key = (model_type, depth)
        if key not in made:
            made[key] = build_lens_ramps(
                root / f"{model_type}-{depth}", tiny_models[model_type], depth=depth, confidence_offset=6.0
            )
        return made[key]

    return get


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["Hub"]:
    """A hub, and this process as one that was started with HF_ENDPOINT and HF_HOME set to it."""
    from huggingface_hub import constants

    from tests.fake_hub import running_hub

    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def zentorch(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """zentorch(True or False): whether AMD's package is installed, on a CPU of AMD's; by itself it is not."""
    from apparate_llm.host import choice, options
    from apparate_llm.tune import candidates

    def installed(there: bool) -> None:
        for module in (choice, options, candidates):
            monkeypatch.setattr(module, "has_zentorch", lambda: there)

    monkeypatch.setattr(options, "takes_zentorch", lambda: True)
    installed(False)
    return installed


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home, as in a container that was given a number for one."""
    for name in ("HOME", "XDG_CACHE_HOME", "APPARATE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
