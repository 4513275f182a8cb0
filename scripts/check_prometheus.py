#!/usr/bin/env python3
"""Our metrics and alert rules with a real Prometheus, while an evaluation runs.

    python -m scripts.check_prometheus [--num-prompts 8] [vLLM flags]

Needs `prometheus` (Debian's package of that name, or a release of https://prometheus.io) on the path. Starts the
default model with early exits and a Prometheus that scrapes it every second with `api/alerts.yml` loaded, then
evaluates it with `apparate-llm eval tpt --base-url` under Poisson arrivals. Exit code 1 unless every rule is healthy
and what Prometheus holds is exactly what the evaluation counted.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from apparate_llm import api
from apparate_llm.engine.vllm_settings import memory_flags
from apparate_llm.eval.servers import Server, free_port
from apparate_llm.eval.systems import ModelChoice, systems_of
from apparate_llm.named_model import model_folder

SETTLE_S = 8.0  # the API asks the engine every second, Prometheus the API as often
COUNTED = {  # metric -> what the evaluation calls it
    "apparate:emitted_total": "emitted",
    "apparate:held_total": "held",
    "apparate:held_accepted_total": "accepted",
    "apparate:released_total": "released",
    "apparate:divergences_total": "divergences",
    "apparate:verification_passes_total": "verification_passes",
    "apparate:draft_steps_total": "draft_steps",
    "apparate:unverified_total": "unverified",
    "apparate:divergences_at_worst_total": "divergences_at_worst",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=8)
    args, flags = parser.parse_known_args()
    if shutil.which("prometheus") is None:
        parser.error("there is no prometheus on the path")
    folder = Path(tempfile.mkdtemp(prefix="check-prometheus-"))
    (system,) = systems_of(["early-exit"], [], ModelChoice(model_folder(None), (*memory_flags(flags), *flags)))
    with Server(system, log=folder / "server.log", start_timeout_s=900) as server:
        server.wait_ready()
        with_prometheus = start_prometheus(server.base_url, folder)
        try:
            return compare(server.base_url, with_prometheus, folder, args.num_prompts)
        finally:
            with_prometheus.process.terminate()
            with_prometheus.process.wait()


class Prometheus:
    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.http = httpx.Client(base_url=f"{url}/api/v1")

    def ask(self, path: str, **params: str) -> Any:
        return self.http.get(path, params=params).raise_for_status().json()["data"]

    def value(self, metric: str, **when: str) -> float:
        """The newest, or that of a time; 0 for a series that has not begun."""
        return sum(float(series["value"][1]) for series in self.ask("/query", query=metric, **when)["result"])


def start_prometheus(base_url: str, folder: Path) -> Prometheus:
    address = f"127.0.0.1:{free_port()}"
    rules = Path(api.__path__[0]) / "alerts.yml"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [base_url.removeprefix("http://")]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    deadline = time.monotonic() + 30
    while True:
        try:
            if httpx.get(f"http://{address}/-/ready").status_code == 200:
                return Prometheus(process, f"http://{address}")
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"Prometheus does not start: {folder / 'prometheus.log'}")
        time.sleep(0.2)


def compare(base_url: str, prometheus: Prometheus, folder: Path, num_prompts: int) -> int:
    out = folder / "eval"
    command = [sys.executable, "-m", "apparate_llm.cli", "eval", "tpt", "--out", str(out), "--systems", "vllm"]
    command += ["--base-url", f"ours={base_url}", "--num-prompts", str(num_prompts), "--max-tokens", "48"]
    # One block, with plain vLLM's before it, in which ours rests.
    subprocess.run([*command, "--rate", "0.5"], check=True)
    time.sleep(SETTLE_S)
    (path,) = (out / "blocks").glob("*-ours.json")
    block = json.loads(path.read_text())
    is_right = True
    for metric, name in COUNTED.items():
        scraped = prometheus.value(metric) - prometheus.value(metric, time=str(block["began_s"]))
        is_right &= scraped == block["counts"][name]
        print(f"{metric}: {scraped:.0f} by Prometheus, {block['counts'][name]} by the evaluation")
    rules = [rule for group in prometheus.ask("/rules")["groups"] for rule in group["rules"]]
    for rule in rules:
        is_right &= rule["health"] == "ok"
        print(f"rule {rule['name']}: {rule['health']}, {rule['state']}")
    return 0 if is_right and rules else 1


if __name__ == "__main__":
    sys.exit(main())
