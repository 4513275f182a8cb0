"""vLLM's flags, however they are spelt, brought to one spelling. Imports nothing heavy.

vLLM's parser takes `--flag value`, `--flag=value`, `--flag_name value`, any beginning of a name that no other flag has,
short forms, `--flag.key value` for one key of a JSON flag, `--flag.key+ value` for an item of a list there, and a YAML
file of all that. See `vllm/utils/argparse_utils.py`; a test holds the tables here to it.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apparate_llm.config import ConfigError, EarlyExitConfig
from apparate_llm.renamed import OPTIONS

# Flags we have something to do with -> the shortest beginning that vLLM takes for it.
SHORTEST = {
    "model": "model",
    "host": "ho",
    "port": "por",
    "uds": "ud",
    "served-model-name": "ser",
    "config": "config",
    "dtype": "dt",
    "load-format": "loa",
    "revision": "rev",
    "download-dir": "do",
    "hf-token": "hf-t",
    "tokenizer": "tokenizer",
    "hf-config-path": "hf-c",
    "generation-config": "ge",
    "api-key": "api-k",
    "kv-cache-memory-bytes": "kv-cache-mem",
    "gpu-memory-utilization": "gp",
    "device-memory-utilization": "device-m",
    "additional-config": "ad",
    "hf-overrides": "hf-o",
    "speculative-config": "specu",
    "spec-method": "spec-me",
    "spec-model": "spec-mo",
    "spec-tokens": "spec-t",
    "worker-cls": "worker-c",
    "scheduler-cls": "scheduler-c",
    "tensor-parallel-size": "te",
    "pipeline-parallel-size": "pi",
    "data-parallel-size": "data-parallel-size",
    "distributed-executor-backend": "distributed-e",
    "quantization": "quantization",
}
OTHER_NAMES = {
    "-sc": "--speculative-config",
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-q": "--quantization",
    "--device-memory-utilization": "--gpu-memory-utilization",
}
JSON_FLAGS = ("additional-config", "hf-overrides", "speculative-config")
# Switches without a `--no-` form: `false` in a YAML file is what they are without being named.
WITHOUT_NO = (
    "headless",
    "grpc",
    "data-parallel-multi-port-external-lb",
    "disable-log-stats",
    "aggregate-engine-logging",
)
MULTIPLIERS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def normalised(argv: list[str]) -> list[str]:
    """The flags of `serve` with the YAML file read, the model named by `--model`, names written out and each of
    JSON_FLAGS given once, as JSON. The command line wins over the file. Raises ConfigError."""
    flags = one_spelling(argv)
    if flags and not flags[0].startswith("-"):
        other = given_value(flags, "model")
        if other is not None and other != flags[0]:
            raise ConfigError(f"two models are named: {flags[0]} and --model {other}")
        flags.insert(0, "--model")
    return joined(with_config_file(flags))


def one_spelling(argv: list[str]) -> list[str]:
    """Names written out with dashes; values as they are."""
    flags: list[str] = []
    of_key = False  # whether this is the value of `--flag.key`, which may begin with a dash
    for token in argv:
        key, equals, value = token.partition("=")
        if of_key or not is_flag(key):
            flags.append(token)
            of_key = False
            continue
        key = canonical(key)
        flags.append(key + equals + value)
        of_key = "." in key and not equals
    if of_key:
        raise ConfigError(f"{flags[-1]}: expected one argument")
    return flags


def is_flag(key: str) -> bool:
    return re.match(r"(--[^\s]|-[A-Za-z]+(\.|$))", key) is not None and " " not in key


def canonical(key: str) -> str:
    """The name of a flag written out, with what follows its first dot."""
    name, dot, path = key.partition(".")
    if name.startswith("--"):
        short = name[2:].replace("_", "-")
        name = "--" + next(
            (full for full, least in SHORTEST.items() if full.startswith(short) and short.startswith(least)), short
        )
    return OTHER_NAMES.get(name, name) + dot + path


def with_config_file(flags: list[str]) -> list[str]:
    """`--config FILE` replaced by what the file says, as far as no flag says something else."""
    names = [flag.partition("=")[0] for flag in flags]
    if "--config" not in names:
        return flags
    if names.count("--config") > 1:
        raise ConfigError("--config: only one file can be given")
    at = names.index("--config")
    has_value = "=" in flags[at]
    if not has_value and at + 1 == len(flags):
        raise ConfigError("--config: expected one argument")
    name = flags[at].partition("=")[2] if has_value else flags[at + 1]
    rest = flags[:at] + flags[at + (1 if has_value else 2) :]
    from_file: list[str] = []
    names = [renamed_flag(name) for name in names]
    for key, value in read_config_file(name).items():
        if renamed_flag(canonical(f"--{key}")) not in names:
            from_file += one_spelling(tokens_of(str(key), value))
    return from_file + rest


def renamed_flag(flag: str) -> str:
    """One of ours by the name it has now."""
    new = OPTIONS.get(flag.removeprefix("--").replace("-", "_"))
    return f"--{new.replace('_', '-')}" if new else flag


def read_config_file(name: str) -> dict[str, object]:
    import yaml  # comes with vLLM

    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config: must be a .yaml or .yml file, got {name}")
    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: cannot read {name}: {' '.join(str(error).split())}") from None
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(f"--config: {name} must be flags and their values, got {type(options).__name__}")
    return options


def tokens_of(key: str, value: object) -> list[str]:
    """One entry of a YAML file as it stands on a command line."""
    if key.replace("-", "_") in (*EarlyExitConfig.model_fields, *OPTIONS):
        return [] if value is None else [f"--{key}={json.dumps(value) if isinstance(value, bool | dict) else value}"]
    if "." in key:
        return [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    if isinstance(value, bool):
        if value:
            return [f"--{key}"]
        return [] if key.replace("_", "-") in WITHOUT_NO else [f"--no-{key}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def joined(flags: list[str]) -> list[str]:
    """Each of JSON_FLAGS once: its keys that are given one by one are merged into the object that is given whole."""
    rest, whole, keys = _apart(flags)
    for name, parts in keys.items():
        config = parse_object(name, whole[name]) if name in whole else {}
        for path, value in parts:
            merge(config, nested(path, value))
        whole[name] = json.dumps(config)
    return rest + [part for name, value in whole.items() for part in (f"--{name}", value)]


def _apart(flags: list[str]) -> tuple[list[str], dict[str, str], dict[str, list[tuple[str, str]]]]:
    """All other flags; the JSON flags given whole, the last one counts; those given by their keys."""
    rest: list[str] = []
    whole: dict[str, str] = {}
    keys: dict[str, list[tuple[str, str]]] = {}
    tokens = iter(flags)
    for token in tokens:
        key, equals, value = token.partition("=")
        name, dot, path = key[2:].partition(".")
        if not is_flag(key) or name not in JSON_FLAGS:
            rest.append(token)
            if is_flag(key) and dot and not equals:
                rest.append(next(tokens))
            continue
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--") and not dot:
                raise ConfigError(f"--{name}: expected one argument")
        if dot:
            keys.setdefault(name, []).append((path, value))
        else:
            whole[name] = value
    return rest, whole, keys


def nested(path: str, text: str) -> dict[str, object]:
    """{"a": {"b": value}} for the path `a.b`; `a.b+` takes a list of comma-separated items."""
    *outer, last = path.removesuffix("+").split(".")
    value: dict[str, object] = {last: text.split(",") if path.endswith("+") else value_of(text)}
    for key in reversed(outer):
        value = {key: value}
    return value


def value_of(text: str) -> object:
    """JSON, a number as people write it (1k is 1000, 1K is 1024), or text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text.strip())
    if match and (match[2].islower() or "." not in match[1]):
        return int(float(match[1]) * MULTIPLIERS[match[2]])
    try:
        return int(text)
    except ValueError:
        return text


def merge(into: dict[str, object], update: Mapping[str, object]) -> None:
    for key, value in update.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merge(old, value)
        elif isinstance(value, list) and isinstance(old, list):
            into[key] = old + value
        else:
            into[key] = value


def parse_object(name: str, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--{name} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"--{name} must be a JSON object, got {text}")
    return parsed


def split_flag(text: str) -> list[str]:
    """One or several flags written into one argument, `--name value` or `--name=value`, as the arguments they are."""
    name, _, value = text.strip().partition(" ")
    value = value.strip()
    if not value or not is_flag(name.partition("=")[0]):
        return [text.strip()]
    if "=" in name:
        return [name, *split_flag(value)] if value.startswith("--") else [text.strip()]
    if value[0] in "{[":  # JSON, with quotes of its own
        return [name, value]
    try:
        return [name, *shlex.split(value)]
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from None


def given_value(flags: list[str], name: str) -> str | None:
    """Value of `--name VALUE` or `--name=VALUE`, the flags in their one spelling; the last one counts. None if it is
    not given."""
    last, name = None, name.replace("_", "-")
    for i, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        if key == f"--{name}":
            last = value if equals else (flags[i + 1] if i + 1 < len(flags) else "")
    return last


def without(flags: list[str], name: str) -> list[str]:
    """The flags but for every `--name VALUE` and `--name=VALUE`."""
    kept: list[str] = []
    tokens = iter(flags)
    for flag in tokens:
        if flag == f"--{name}":
            next(tokens, None)
        elif not flag.startswith(f"--{name}="):
            kept.append(flag)
    return kept
