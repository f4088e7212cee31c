"""The page's server: what it serves, whom it answers, and what it refuses."""

from __future__ import annotations

import http.client
import json
import threading

import pytest

from cloud_learner.simulate.page_server import BODY_BYTES_MAX, PageServer
from edge_runtime.errors import ConfigError, RequestError


def echo(body: bytes) -> bytes:
    return body


def refuse(body: bytes) -> bytes:
    raise RequestError("no_such_story", "there is no such story", "ask again")


@pytest.fixture
def server():
    with PageServer(0, b"<p>page") as server:
        server.answers = {"echo": echo, "refuse": refuse}
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(server):
    """`ask("POST", "/echo", b"{}")`: status, headers, body."""

    def asked(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given = {"Content-Type": "application/json"} | given
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    return asked


def test_the_page_is_at_the_root_and_may_load_nothing_else(ask):
    status, headers, body = ask("GET", "/")

    assert (status, body) == (200, b"<p>page")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "connect-src 'self'" in headers["Content-Security-Policy"]


def test_a_question_gets_its_answer(ask):
    assert ask("POST", "/echo", b'{"key":"a"}')[::2] == (200, b'{"key":"a"}')


def test_an_error_is_told_with_its_code_and_hint(ask):
    status, _, body = ask("POST", "/refuse", b"{}")

    told = {"code": "no_such_story", "error": "there is no such story", "hint": "ask again"}
    assert (status, json.loads(body)) == (400, told)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/echo", {"Host": "headwater.example"}),
        ("/echo", {"Content_Type": "text/plain"}),
        ("/echo", {"Content_Length": str(BODY_BYTES_MAX + 1)}),
        ("/echo", {"Content_Length": "-1"}),
        ("/", {}),
        ("/else", {}),
    ],
)
def test_what_the_page_does_not_ask_is_refused(ask, path, headers):
    status, _, body = ask("POST", path, b"{}", **headers)

    assert (status, json.loads(body)["code"]) == (400, "bad_request")


def test_the_page_is_not_shown_under_another_name(ask):
    assert ask("GET", "/", Host="headwater.example")[0] == 404


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(ConfigError) as found:
        PageServer(server.server_port, b"")

    assert found.value.code == "port_taken"
    assert f"port {server.server_port}" in found.value.message
