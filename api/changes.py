"""Options changed while serving: on all ranks of all engines, or on none."""

from collections.abc import Mapping

from fastapi import HTTPException
from vllm.logger import init_logger

from apparate_llm.api.engines import num_engines
from apparate_llm.api.exit_server import ExitServer
from apparate_llm.config import ConfigError, EarlyExitConfig, parse_live

logger = init_logger("vllm.apparate")
CONFIGURE = "early_exit_configure"


async def change_all(server: ExitServer, changes: Mapping[str, object]) -> EarlyExitConfig:
    """The options before; the server takes those in force up before and after. Raises HTTPException: 400 where they are
    not allowed, 503 where an engine failed at them. Nothing has changed then."""
    try:
        parse_live(changes, server.config)  # what makes no sense costs the engine nothing
    except ConfigError as error:
        raise HTTPException(400, str(error)) from None
    if server.neighbours.exist:
        await server.take_up()  # they may have changed some a moment ago
    is_one = num_engines(server.engine) == 1  # its own refusal leaves everything as it is
    if not is_one and (refusal := _first(await server.ask(CONFIGURE, changes, True))):
        raise HTTPException(400, refusal)
    before = server.config
    try:
        failure = _first(await server.ask(CONFIGURE, changes))
    except Exception as error:
        is_one, failure = False, str(error) or type(error).__name__
    if failure:
        await _take_back(server, {name: getattr(before, name) for name in changes})
        raise HTTPException(400 if is_one else 503, failure if is_one else f"nothing was changed: {failure}")
    await server.take_up()
    return before


async def _take_back(server: ExitServer, values: Mapping[str, object]) -> None:
    try:
        failure = _first(await server.ask(CONFIGURE, values))
        await server.take_up()
    except Exception as error:
        failure = str(error) or type(error).__name__
    if failure:
        logger.error("A change of options failed and could not be taken back everywhere: %s", failure)


def _first(answers: list[str | None]) -> str | None:
    return next(filter(None, answers), None)
