"""Dockerfile and compose.yaml: what they name is there, and what they promise holds as far as it can be read."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from apparate_llm.doctor import LIBRARY_FIX
from tests.dockerfile import DOCKERFILE, ROOT, command_of, last_stage, sent_to_docker

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def test_a_linter_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("no hadolint in this environment: `make` installs it")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_serves_as_nobody_special_and_gets_its_signals():
    stage = last_stage()
    assert int(stage["USER"]) >= 1000
    assert command_of(stage["ENTRYPOINT"]) == ["tini", "--", "apparate-llm", "serve"]
    port = stage["EXPOSE"]
    assert port == "8000" and f"http://127.0.0.1:{port}/health" in command_of(stage["HEALTHCHECK"])[-1]


def test_all_that_is_kept_is_in_the_one_volume():
    stage = last_stage()
    folders = dict(re.findall(r"(\w+)=(/cache\S*)", stage["ENV"]))
    assert stage["VOLUME"] == "/cache" and {"XDG_CACHE_HOME", "HF_HOME"} == folders.keys()
    assert f"--home-dir {stage['VOLUME']} " in DOCKERFILE
    assert SERVICES["server"]["volumes"] == ["cache:/cache"]


def test_the_image_has_the_library_that_doctor_asks_for():
    package = LIBRARY_FIX["libtcmalloc_minimal.so.4"].split()[-1]
    assert re.search(rf"apt-get install [^&]*\b{package}\b", DOCKERFILE)
    assert "doctor --fix" in DOCKERFILE


def test_docker_is_sent_what_a_wheel_is_made_of_and_nothing_else():
    assert all((ROOT / name).exists() for name in sent_to_docker())
    links = {path.name for path in (ROOT / "apparate_llm").iterdir() if path.is_symlink()}
    assert sent_to_docker() >= {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "apparate_llm", *links}
    assert not any(fnmatch(name, pattern) for name in sent_to_docker() for pattern in (".*", "tests", "docs"))


def mounts(service: str) -> dict[str, str]:
    """Place in the container -> what is mounted there."""
    parts = [text.split(":") for text in SERVICES[service].get("volumes", ())]
    return {place: source for source, place, *_ in parts}


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_is_there(service):
    for place, source in mounts(service).items():
        if source.startswith("."):
            assert (ROOT / source).is_file(), place
        else:
            assert source in COMPOSE["volumes"]


def test_nothing_is_open_to_others_by_itself():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert SERVICES["server"]["environment"]["APPARATE_ADMIN_KEY"].startswith("${APPARATE_ADMIN_KEY:?")


def test_prometheus_asks_the_server_and_reads_the_alerts():
    sources = mounts("prometheus")
    config = yaml.safe_load((ROOT / sources["/etc/prometheus/prometheus.yml"]).read_text())
    targets = [target for job in config["scrape_configs"] for one in job["static_configs"] for target in one["targets"]]
    assert targets == [f"server:{last_stage()['EXPOSE']}"] and "server" in SERVICES
    assert [sources[f"/etc/prometheus/{name}"] for name in config["rule_files"]] == ["./api/alerts.yml"]


def test_grafana_finds_prometheus_and_the_dashboard():
    mounted = mounts("grafana")
    sources = yaml.safe_load((ROOT / mounted["/etc/grafana/provisioning/datasources/prometheus.yml"]).read_text())
    (source,) = sources["datasources"]
    port = SERVICES["prometheus"]["ports"][0].split(":")[-1]
    assert source["url"] == f"http://prometheus:{port}" and source["isDefault"]
    providers = yaml.safe_load((ROOT / mounted["/etc/grafana/provisioning/dashboards/files.yml"]).read_text())
    folder = providers["providers"][0]["options"]["path"]
    assert [what for place, what in mounted.items() if place.startswith(f"{folder}/")] == ["./api/grafana.json"]
    dashboard = json.loads((ROOT / "api" / "grafana.json").read_text())
    variables = {(one["type"], one["query"]) for one in dashboard["templating"]["list"]}
    assert ("datasource", source["type"]) in variables  # takes the default one
