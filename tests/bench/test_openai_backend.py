"""Load over OpenAI's completions, against a server on a real port that streams by script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deltamux.bench import driver
from deltamux.bench.backend import BackendError
from deltamux.bench.driver import Outcome
from deltamux.bench.openai_backend import OpenAIBackend
from deltamux.bench.workload import PlannedRequest
from deltamux.cli import main

MODELS: dict[str, object] = {
    "data": [{"id": "base", "parent": None}, {"id": "a", "parent": "base"}]
}


def counted(*totals: int) -> list[str]:
    """Messages that say how many tokens there are so far, without text."""
    return [
        json.dumps({"choices": [{"text": ""}], "usage": {"completion_tokens": total}})
        for total in totals
    ]


def texts(*texts: str) -> list[str]:
    return [json.dumps({"choices": [{"text": text}]}) for text in texts]


def final(total: int) -> str:
    return json.dumps({"choices": [], "usage": {"completion_tokens": total}})


class Scripted(BaseHTTPRequestHandler):
    """Answers a completion by the script of its model, 404 where there is none."""

    server: ScriptedServer

    def do_GET(self) -> None:
        self._head(200)
        self.wfile.write(json.dumps(self.server.models).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        script = self.server.scripts.get(body["model"])
        self._head(200 if script is not None else 404)
        for data in script or []:
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

    def _head(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, *ignored: object) -> None:
        pass


class ScriptedServer(ThreadingHTTPServer):
    def __init__(self, scripts: dict[str, list[str]]) -> None:
        super().__init__(("127.0.0.1", 0), Scripted)
        self.scripts = scripts
        self.models = MODELS
        self.asked: list[dict[str, object]] = []
        self.target = f"127.0.0.1:{self.server_port}"


@contextmanager
def serving(**scripts: list[str]) -> Iterator[ScriptedServer]:
    with ScriptedServer(scripts) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


async def play(target: str, *adapters: str) -> list[Outcome]:
    plan = [PlannedRequest(0.0, adapter, (17, 23), 5) for adapter in adapters]
    async with aclosing(OpenAIBackend(target, 100)) as backend:
        return await driver.play(backend, plan)


async def test_ids_go_out_and_counted_tokens_come_back() -> None:
    with serving(a=[*counted(1, 3, 3, 5), final(5), "[DONE]"]) as server:
        [outcome] = await play(server.target, "a")
    assert (outcome.output_tokens, outcome.error, outcome.hot) == (5, "", None)
    assert len(outcome.inter_token) == 4
    assert 0 < outcome.first_token <= outcome.latency
    [asked] = server.asked
    assert (asked["model"], asked["prompt"], asked["max_tokens"]) == ("a", [17, 23], 5)
    assert (asked["stream"], asked["temperature"], asked["ignore_eos"]) == (True, 0.0, True)


async def test_a_server_that_counts_at_the_end_gets_a_token_a_text_until_then() -> None:
    with serving(a=[*texts("x", "", "y"), final(4), "[DONE]"]) as server:
        [outcome] = await play(server.target, "a")
    assert (outcome.output_tokens, len(outcome.inter_token)) == (4, 3)


async def test_the_base_is_the_model_without_a_parent_and_adapters_are_the_others() -> None:
    with serving(base=[*counted(5), "[DONE]"]) as server:
        [outcome] = await play(server.target, "")
        async with aclosing(OpenAIBackend(f"http://{server.target}", 100)) as backend:
            assert await backend.adapters() == ("a",)
    assert outcome.error == ""
    assert server.asked[0]["model"] == "base"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ([*counted(1), json.dumps({"error": {"code": 500, "message": "lost"}})], "HTTP 500"),
        (counted(1), "INCOMPLETE"),
        ([*counted(1), "<html>"], "MALFORMED"),
        (["{}"], "MALFORMED"),
        (["[1]"], "MALFORMED"),
        (['{"error": "lost"}'], "MALFORMED"),
    ],
)
async def test_an_answer_that_breaks_off_is_a_failure(script: list[str], code: str) -> None:
    with serving(a=script) as server:
        [outcome] = await play(server.target, "a")
    assert outcome.error == code


async def test_an_unknown_adapter_is_the_status_of_its_answer() -> None:
    with serving(a=[*counted(5), "[DONE]"]) as server:
        outcomes = await play(server.target, "b", "a")
    assert [outcome.error for outcome in outcomes] == ["HTTP 404", ""]


async def test_what_lists_no_models_is_no_such_server() -> None:
    with serving() as server:
        for server.models in ({}, {"data": None}, {"data": ["a"]}, {"data": [{}]}):
            with pytest.raises(BackendError, match="/v1/models lists no models"):
                await OpenAIBackend(server.target, 100).adapters()


async def test_no_server_is_a_failure_of_each_request() -> None:
    with serving() as server:
        pass
    [outcome] = await play(server.target, "a")
    assert outcome.error == "ConnectError"
    with pytest.raises(BackendError, match="ConnectError"):
        await OpenAIBackend(server.target, 100).adapters()


def test_the_command_asks_for_all_adapters_of_the_server(tmp_path: Path) -> None:
    with serving(a=[*counted(2), "[DONE]"]) as server:
        arguments = ["--backend", "openai", "--target", server.target, "--vocab-size", "100"]
        arguments += ["--num-prompts", "3", "--save-json", str(tmp_path / "figures.json")]
        assert main(["bench", *arguments]) == 0
    text = (tmp_path / "figures.json").read_text()
    # Python alone would read the word Infinity, which is no JSON.
    [figures] = json.loads(text, parse_constant=pytest.fail)
    assert (figures["backend"], figures["completed"]) == ("openai", 3)
    assert figures["request_rate"] == "inf"
    assert figures["total_output_tokens"] == 6
    assert all(max(asked["prompt"]) < 100 for asked in server.asked)


def test_the_command_says_why_nothing_was_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        arguments = ["--backend", "openai", "--target", server.target, "--vocab-size", "100"]
        assert main(["bench", *arguments, "--num-prompts", "3", "--adapter", "b"]) == 1
    captured = capsys.readouterr()
    assert "failed, as one said: HTTP 404: " in captured.out
    assert captured.err.endswith("deltamux bench: NO_ANSWER: not one request was answered\n")


def test_the_command_wants_the_size_of_the_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--backend", "openai"]) == 2
    assert "--vocab-size" in capsys.readouterr().err
