"""Options of a request, and of the server while it answers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest


@pytest.mark.parametrize(
    ("xargs", "says"),
    [
        ({"early_exit": 7}, "early_exit: Input should be 0 or 1, got 7"),
        ({"accuracy_bound": 0.9}, "accuracy_bound: at most the server's 0.5, got 0.9"),
        ({"early_exot": 1, "early_exit_depth": 1}, "early_exit_depth: unknown option"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_option_is_a_400(server, client, xargs, says, stream):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "w1 w2"}],
            max_tokens=4,
            stream=stream,
            extra_body={"vllm_xargs": xargs},
        )
    assert says in str(error.value)
    assert httpx.get(f"{server}/health").status_code == 200


def test_a_request_may_switch_exits_off_for_itself(server, client):
    def counts():
        return httpx.get(f"{server}/early_exit/status").json()["counts"]

    before = counts()
    for options in ({"early_exit": 0}, {"accuracy_bound": 0.0}):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "w1 w2"}],
            max_tokens=40,
            temperature=0,
            extra_body={"vllm_xargs": options, "ignore_eos": True},
        )
        after = counts()
        assert after["released"] == before["released"]
        if options.get("early_exit") == 0:
            assert after["held"] == before["held"] and after["emitted"] == before["emitted"] + 40


def test_a_hundred_changes_under_load_fail_no_request(server):
    """Every change is in force, and on the metrics page, when its answer arrives."""
    body = {"model": "tiny", "prompt": "w1 w2 w3", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    begun, changed = threading.Barrier(3, timeout=60), threading.Event()

    def load() -> list[str]:
        """Requests until all changes are made, one at the least; returns the answers that are not whole."""
        broken = []
        with httpx.Client(base_url=server, timeout=60) as http:
            begun.wait()
            while True:
                answer = http.post("/v1/completions", json=body)
                if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 100:
                    broken.append(answer.text)
                if changed.is_set():
                    return broken

    with ThreadPoolExecutor(2) as clients, httpx.Client(base_url=f"{server}/early_exit", timeout=60) as http:
        start = http.get("/config").json()["config"]
        loads = [clients.submit(load) for _ in range(2)]
        begun.wait()
        try:
            for number in range(100):
                policy = ("static", "adaptive", "off", "apparate")[number % 4]
                changes = {"policy": policy, "max_exits": 1 + number % 6, "accuracy_bound": (number % 5) / 10}
                answer = http.patch("/config", json=changes)
                assert answer.status_code == 200, answer.text
                assert answer.json()["config"].items() >= changes.items()
                if number % 10 == 0:
                    assert http.get("/status").json()["config"].items() >= changes.items()
                    assert f"\napparate:max_exits {1 + number % 6}.0\n" in http.get(f"{server}/metrics").text
        finally:
            changed.set()
            back = {name: start[name] for name in ("policy", "max_exits", "accuracy_bound")}
            http.patch("/config", json=back).raise_for_status()
        assert [future.result() for future in loads] == [[], []]
        status = http.get("/status").json()
    assert status["active"] and status["counts"]["fallbacks"] == 0 and status["config"] == start


def test_beam_search_refuses_what_it_cannot_do_and_does_the_rest(server):
    body = {"model": "tiny", "prompt": "w1", "max_tokens": 3, "n": 2, "use_beam_search": True, "temperature": 0}
    with httpx.Client(base_url=server, timeout=60) as http:
        for xargs, says in (({"early_exit": 7}, "should be 0 or 1"), ({"early_exit_report": 1}, "takes no exits")):
            answer = http.post("/v1/completions", json={**body, "vllm_xargs": xargs})
            assert answer.status_code == 400 and says in answer.text
        answer = http.post("/v1/completions", json={**body, "vllm_xargs": {"early_exit": 0}})
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 2
