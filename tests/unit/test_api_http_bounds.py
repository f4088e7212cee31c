"""HTTP under bad input: bodies too large, lies about lengths, silence, a thousand connections."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import resource
import select
import socket
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.api.http import HttpServer
from edge_runtime.runtime import Runtime

Serve = Callable[..., Any]
WriteModel = Callable[..., Path]
INFER = "/v2/models/same/infer"
SMALL = 64 << 10
TENSOR = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
BODY = json.dumps({"inputs": [TENSOR]}).encode()
PAIR = json.dumps({"inputs": [TENSOR | {"shape": [2, 3], "data": [1, 2, 3] * 2}]}).encode()


def connect(served: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), 10)


def head(*lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {INFER} HTTP/1.1", "Host: device", *lines, "", ""]).encode()


def answers(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    chunks = []
    while chunk := client.recv(1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def one_answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer on a connection that stays open."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = client.recv(1 << 16)
        assert chunk, f"closed after {data!r}"
        data += chunk
    lines, _, body = data.partition(b"\r\n\r\n")
    size = int(lines.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < size:
        body += client.recv(1 << 16)
    return int(lines.split()[1]), body


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def still_serves(served: Any) -> bool:
    return served.ask("POST", INFER, BODY)[0] == 200


def test_a_body_of_100_mb_is_refused_and_memory_stays_flat(served: Any) -> None:
    assert still_serves(served)
    before = resident_bytes()

    with connect(served) as client:
        client.sendall(head(f"Content-Length: {100 << 20}"))
        status, body = one_answer(client)  # before any of it was sent
        for _ in range(100):
            client.sendall(bytes(1 << 20))
        assert resident_bytes() - before < 8 << 20
        client.sendall(head("Content-Length: 0"))  # the connection goes on
        after = one_answer(client)[0]

    assert (status, after) == (413, 400)
    assert b"body_too_large" in body
    assert still_serves(served)


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(
    serve: Serve, write_model: WriteModel
) -> None:
    served = serve(write_model(), body_bytes_max=SMALL)

    with connect(served) as client:
        client.sendall(head("Transfer-Encoding: chunked"))
        for _ in range(9):
            client.sendall(b"2000\r\n" + bytes(0x2000) + b"\r\n")
        status, body = one_answer(client)
        client.sendall(b"0\r\n\r\n" + head(f"Content-Length: {len(BODY)}") + BODY)
        assert one_answer(client)[0] == 200

    assert (status, b"body_too_large" in body) == (413, True)


def test_a_chunked_body_is_read_like_any_other(serve: Serve, write_model: WriteModel) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)

    with connect(serve(write_model())) as client:
        client.sendall(head("Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
        assert one_answer(client)[0] == 200


@pytest.mark.parametrize("bomb", [gzip.compress(bytes(64 << 20)), zlib.compress(bytes(64 << 20))])
def test_a_bomb_is_refused(serve: Serve, write_model: WriteModel, bomb: bytes) -> None:
    served = serve(write_model(), body_bytes_max=1 << 20)
    encoding = "gzip" if bomb.startswith(b"\x1f\x8b") else "deflate"

    status, said = served.json("POST", INFER, bomb, Content_Encoding=encoding)

    assert (status, "body_too_large" in said["error"]) == (413, True)
    assert served.server.statistics()["held_bytes"] == 0


@pytest.mark.parametrize(
    ("body", "encoding", "status", "why"),
    [
        (b"no gzip", "gzip", 400, "bad_encoding"),
        (gzip.compress(BODY, mtime=0)[:-9], "gzip", 400, "bad_encoding"),
        (gzip.compress(BODY, mtime=0) + b"more", "gzip", 400, "bad_encoding"),
        (BODY, "br", 415, "unknown_encoding"),
    ],
)
def test_a_bad_encoding_is_named(
    served: Any, body: bytes, encoding: str, status: int, why: str
) -> None:
    found, said = served.json("POST", INFER, body, Content_Encoding=encoding)

    assert (found, why in said["error"]) == (status, True)


@pytest.mark.parametrize("length", ["-1", "9999", "x", "1e3", "", "9" * 30])
def test_a_lie_about_the_length_of_the_json_is_refused(
    serve: Serve, write_model: WriteModel, length: str
) -> None:
    headers = {"Inference-Header-Content-Length": length}

    status, _, said = serve(write_model()).ask("POST", INFER, BODY, headers)

    assert (status, b"bad_request" in said) == (400, True)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        head("Content-Length: -5"),
        head("Content-Length: 5", "Content-Length: 6"),
        head("Content-Length: 5", "Transfer-Encoding: chunked"),
        head("Transfer-Encoding: chunked") + b"zz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_one_error_and_only_its_connection_is_closed(
    served: Any, garbage: bytes
) -> None:
    with connect(served) as other, connect(served) as client:
        client.sendall(garbage)
        said = answers(client)
        other.sendall(head(f"Content-Length: {len(BODY)}") + BODY)
        assert one_answer(other)[0] == 200

    assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert said.count(b"HTTP/1.1 4") == 1
    assert served.server.statistics()["bad_requests"] == 1


def test_an_endless_head_is_cut_off(served: Any) -> None:
    with connect(served) as client:
        client.sendall(head("X: ")[:-4])
        for _ in range(100):
            client.sendall(b"a" * 4096)
        said = answers(client)

    assert said.startswith(b"HTTP/1.1 431 ")
    assert still_serves(served)


@pytest.mark.parametrize(
    "half",
    [b"", b"POST /v2", head("Content-Length: 9999") + b"{", head("Transfer-Encoding: chunked")],
)
def test_half_a_request_then_silence_ends_in_a_closed_connection(
    serve: Serve, write_model: WriteModel, half: bytes
) -> None:
    served = serve(write_model(), silence_s=0.1)

    with connect(served) as client:
        client.sendall(half)
        assert answers(client) == b""

    assert still_serves(served)
    assert served.server.statistics()["held_bytes"] == 0


def test_a_thousand_idle_connections_keep_nobody_from_being_served(
    serve: Serve, write_model: WriteModel
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    served = serve(write_model())
    assert still_serves(served)
    before = resident_bytes()
    idle = [connect(served) for _ in range(1000)]
    try:
        for client in idle[::100]:  # they are open, not just queued
            client.sendall(head(f"Content-Length: {len(BODY)}") + BODY)
            assert one_answer(client)[0] == 200
        assert still_serves(served)
        assert served.server.statistics()["open"] >= 1000
        assert resident_bytes() - before < 16 << 20
    finally:
        for client in idle:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_pipelined_requests_are_answered_in_their_order(
    serve: Serve, write_model: WriteModel
) -> None:
    bodies = [json.dumps({"id": str(n), "inputs": [TENSOR]}).encode() for n in range(500)]
    data = b"".join(head(f"Content-Length: {len(body)}") + body for body in bodies)

    with connect(serve(write_model())) as client:
        client.sendall(data + head("Connection: close", "Content-Length: 0"))
        said = answers(client)

    ids = [int(part.partition(b'"')[0]) for part in said.split(b'"id":"')[1:]]
    assert ids == list(range(500))
    assert said.endswith(b"}")
    assert said.count(b"connection: close") == 1


def test_what_runs_elsewhere_keeps_the_order_too(serve: Serve, write_model: WriteModel) -> None:
    served = serve(write_model(only_rows=2))
    assert not served.runtime.model("same").inline
    infer = head(f"Content-Length: {len(PAIR)}") + PAIR
    live = head("Connection: close", method="GET").replace(INFER.encode(), b"/v2/health/live")

    with connect(served) as client:
        client.sendall(infer + infer + live)
        said = answers(client)

    assert [part[:5] for part in said.split(b"\r\n\r\n")[1:]] == [b'{"mod', b'{"mod', b'{"liv']


def test_a_client_that_says_no_more_gets_what_it_asked_for(
    serve: Serve, write_model: WriteModel
) -> None:
    with connect(serve(write_model(only_rows=2))) as client:
        client.sendall(head(f"Content-Length: {len(PAIR)}") + PAIR)
        client.shutdown(socket.SHUT_WR)
        assert answers(client).startswith(b"HTTP/1.1 200 OK")


def test_a_deadline_that_is_over_is_an_error_that_says_so(
    serve: Serve, write_model: WriteModel
) -> None:
    served = serve(write_model(only_rows=50_000))
    rows = {"name": "x", "shape": [50_000, 3], "datatype": "FP32", "data": [0.5] * 150_000}

    body = {"inputs": [rows], "parameters": {"timeout": 1}}
    status, headers, said = served.ask("POST", INFER, body)

    assert (status, headers["retry-after"]) == (503, "1")
    assert b"deadline_exceeded" in said
    assert served.json("POST", INFER, {"inputs": [rows]})[0] == 200


def test_a_model_that_fails_is_an_error_of_the_server(
    serve: Serve, write_model: WriteModel
) -> None:
    served = serve(write_model(only_rows=2))

    status, said = served.json("POST", INFER, BODY)

    assert (status, "run_failed" in said["error"]) == (500, True)
    assert served.server.statistics()["failed"] == 1
    assert served.ask("POST", INFER, PAIR)[0] == 200


def test_a_client_that_does_not_read_is_not_read_from(served: Any) -> None:
    rows = bytes(12 * 80_000)
    one = head(f"Content-Length: {len(rows)}", "Inference-Header-Content-Length: 0") + rows
    last = head("Connection: close", "Content-Length: 0")

    with connect(served) as client:
        sender = threading.Thread(target=client.sendall, args=(one * 40 + last,))
        sender.start()
        sender.join(0.3)
        assert sender.is_alive()  # 38 MB of requests do not fit into buffers
        assert served.server.statistics()["held_bytes"] < 4 << 20
        said = answers(client)
        sender.join()

    assert said.count(b"HTTP/1.1 200 OK") == 40
    assert said.count(b"HTTP/1.1 400 Bad Request") == 1


def test_closing_lets_an_answer_that_is_under_way_leave(write_model: WriteModel) -> None:
    async def scene() -> None:
        with Runtime.open(package=write_model(only_rows=2)) as runtime:
            server = HttpServer(runtime, runtime.statistics)
            await server.start(0)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            live = head(method="GET").replace(INFER.encode(), b"/v2/health/live")
            writer.write(live + head(f"Content-Length: {len(PAIR)}") + PAIR)
            assert (await reader.readuntil(b"}")).endswith(b'{"live":true}')  # the other began
            await server.close()
            said = await reader.read()
            writer.close()
        assert said.startswith(b"HTTP/1.1 200 OK\r\n")
        assert server.statistics()["open"] == 0

    asyncio.run(scene())


def test_a_client_that_expects_100_continue_is_told_to(
    serve: Serve, write_model: WriteModel
) -> None:
    with connect(serve(write_model())) as client:
        client.sendall(head("Expect: 100-continue", f"Content-Length: {len(BODY)}"))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY)
        assert one_answer(client)[0] == 200


@pytest.mark.parametrize(
    "lines", [("Connection: close",), ("Connection: upgrade", "Upgrade: websocket")]
)
def test_after_its_last_request_a_connection_is_closed(
    serve: Serve, write_model: WriteModel, lines: tuple[str, ...]
) -> None:
    live = head(*lines, method="GET").replace(INFER.encode(), b"/v2/health/live")

    with connect(serve(write_model())) as client:
        client.sendall(live)
        assert answers(client).endswith(b'{"live":true}')


def test_what_follows_the_last_request_is_not_read(served: Any) -> None:
    with connect(served) as client:
        client.sendall(head("Connection: close", f"Content-Length: {len(BODY)}") + BODY + b"more")
        said = answers(client)

    assert said.count(b"HTTP/1.1 ") == 1
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")


def test_another_method_is_told_which_one(served: Any) -> None:
    with connect(served) as client:
        client.sendall(head(method="HEAD") + head("Connection: close", method="GET"))
        first, second = answers(client).split(b"HTTP/1.1 405 Method Not Allowed\r\n")[1:]

    assert b"allow: POST\r\n" in first
    assert first.endswith(b"content-length: 0\r\nallow: POST\r\n\r\n")
    assert b"bad_method" in second


def test_a_client_that_waits_to_be_told_is_answered_in_order(
    serve: Serve, write_model: WriteModel
) -> None:
    with connect(serve(write_model(only_rows=2))) as client:
        size = f"Content-Length: {len(PAIR)}"
        client.sendall(head(size) + PAIR + head("Expect: 100-continue", size))
        status, _ = one_answer(client)
        client.sendall(PAIR)
        assert (status, one_answer(client)[0]) == (200, 200)


def test_a_page_in_a_browser_is_refused(serve: Serve, write_model: WriteModel) -> None:
    status, said = serve(write_model()).json("POST", INFER, BODY, Origin="https://example.org")

    assert (status, "browser_refused" in said["error"]) == (403, True)


def test_bodies_that_are_held_at_once_are_bounded_together(
    serve: Serve, write_model: WriteModel
) -> None:
    served = serve(write_model(), body_bytes_max=SMALL)
    clients = [connect(served) for _ in range(8)]
    try:
        for client in clients:
            client.sendall(head(f"Content-Length: {SMALL}") + bytes(SMALL - 1))
        refused = select.select(clients, [], [], 10)[0]
        assert one_answer(refused[0])[0] == 503
        assert served.server.statistics()["held_bytes"] <= 5 * SMALL
    finally:
        for client in clients:
            client.close()
    assert still_serves(served)


def test_deep_nesting_is_refused(served: Any) -> None:
    tensor = BODY.replace(b"[1, 2, 3]", b"[" * 100_000 + b"]" * 100_000)

    for body in (b"[" * 1_000_000, b'{"a":' * 100_000, tensor):
        status, said = served.json("POST", INFER, body)
        assert (status, "bad_request" in said["error"]) == (400, True)
    assert still_serves(served)


def test_a_body_in_tiny_chunks_takes_no_more_memory_than_its_bytes(served: Any) -> None:
    assert still_serves(served)
    before = resident_bytes()
    size = 4 << 20

    with connect(served) as client:
        client.sendall(head("Transfer-Encoding: chunked"))
        for _ in range(64):
            client.sendall(b"2\r\n  \r\n" * (size // 128))
        client.sendall(b"%x\r\n%b\r\n" % (len(BODY), BODY))
        client.sendall(head("X: y")[:-2])  # no chunk: the body is read, and its end never comes
        assert one_answer(client)[0] == 400
        assert served.server.statistics()["held_bytes"] >= size
        assert resident_bytes() - before < 5 * size


def test_what_is_whole_of_many_chunks_is_what_was_sent(served: Any) -> None:
    blanks = b"2\r\n  \r\n" * 100_000
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)

    with connect(served) as client:
        client.sendall(head("Transfer-Encoding: chunked") + blanks + body)
        assert one_answer(client)[0] == 200

    assert served.server.statistics()["held_bytes"] == 0


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"POST /v2", b"a"),
        (head("A: b")[:-2], b"X: y\r\n"),
        (head("Content-Length: 9999"), b" "),
        (head("Transfer-Encoding: chunked"), b"1\r\n \r\n"),
        (head(f"Content-Length: {1 << 30}"), b" "),
    ],
)
def test_a_request_that_dribbles_in_ends_in_a_closed_connection(
    serve: Serve, write_model: WriteModel, begin: bytes, piece: bytes
) -> None:
    served = serve(write_model(), silence_s=0.2)

    with connect(served) as client:
        client.sendall(begin)
        client.settimeout(0.02)  # so often comes a piece
        pieces = dribbled(client, piece, 500)

    assert pieces < 500
    assert still_serves(served)
    assert served.server.statistics()["held_bytes"] == 0


def dribbled(client: socket.socket, piece: bytes, pieces_max: int) -> int:
    """How many pieces could be sent until the server closed."""
    for number in range(pieces_max):
        try:
            client.sendall(piece)
            while client.recv(1 << 16):
                pass
        except TimeoutError:
            continue
        except ConnectionError:
            pass
        return number
    return pieces_max


def test_a_large_body_that_comes_slowly_has_the_time_that_it_needs(
    serve: Serve, write_model: WriteModel
) -> None:
    served = serve(write_model(), silence_s=0.5)
    pieces = [b" " * (32 << 10)] * 30

    with connect(served) as client:
        client.sendall(head(f"Content-Length: {len(BODY) + (960 << 10)}"))
        for piece in pieces:  # three times as long as a small body may take
            client.sendall(piece)
            assert select.select([client], [], [], 0.05)[0] == []
        client.sendall(BODY)
        assert one_answer(client)[0] == 200


@pytest.mark.parametrize("ending", [b"\r\n", b""])
def test_the_number_of_headers_is_bounded(served: Any, ending: bytes) -> None:
    headers = b"".join(b"%x:\r\n" % number for number in range(100))

    with connect(served) as client:
        client.sendall(head("Content-Length: 0")[:-2])
        client.sendall(headers + ending)
        status, said = one_answer(client)

    assert (status, b"head_too_large" in said) == (431, True)
    assert still_serves(served)
    assert served.server.statistics()["held_bytes"] == 0


def test_heads_that_are_half_there_are_bounded_together(
    serve: Serve, write_model: WriteModel
) -> None:
    served = serve(write_model(), body_bytes_max=16 << 10)
    clients = [connect(served) for _ in range(6)]
    try:
        for client in clients:
            client.sendall(head("X: " + "x" * (16 << 10))[:-2])
        refused = select.select(clients, [], [], 10)[0]
        assert one_answer(refused[0])[0] == 503
        assert served.server.statistics()["held_bytes"] <= 5 * (17 << 10)
    finally:
        for client in clients:
            client.close()
    assert still_serves(served)


def test_what_a_half_request_holds_is_given_back(serve: Serve, write_model: WriteModel) -> None:
    served = serve(write_model())
    begin = head("X: " + "x" * 1000, f"Content-Length: {len(BODY)}")

    with connect(served) as client:
        for _ in range(3):
            for piece in (begin[:500], begin[500:] + BODY[:9]):
                client.sendall(piece)
                while served.server.statistics()["held_bytes"] < 500:
                    assert select.select([client], [], [], 0.01)[0] == []
            client.sendall(BODY[9:])
            assert one_answer(client)[0] == 200
        assert served.server.statistics()["held_bytes"] == 0


MANY = 2_000_000


@pytest.mark.parametrize(
    "text",
    [
        b'{"inputs":[' + BODY[12:-2].replace(b"1, 2, 3", b"1" + b",1" * MANY) + b"]}",
        b'{"inputs":[' + BODY[12:-2].replace(b"1, 2, 3", b"[]" + b",[]" * MANY) + b"]}",
        b'{"inputs":[],"parameters":{"a":[{}' + b",{}" * MANY + b"]}}",
        b'{"inputs":[],"parameters":{"a":{"a":0' + b',"a":0' * 100_000 + b"}}}",
        b'{"inputs":[],"outputs":[{"name":"y"}' + b',{"name":"y"}' * 100_000 + b"]}",
    ],
)
def test_json_that_would_take_much_more_memory_than_its_bytes_is_refused(
    served: Any, text: bytes
) -> None:
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    status, said = served.json("POST", INFER, text)

    assert (status, "body_too_large" in said["error"]) == (413, True)
    assert peak_bytes() - before < 40 << 20


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def test_a_large_batch_as_json_is_answered(serve: Serve, write_model: WriteModel) -> None:
    rows = 300_000
    data = b"1" + b",1" * (rows * 3 - 1)
    tensor = b'{"name":"x","shape":[%d,3],"datatype":"FP32","data":[%b]}' % (rows, data)
    text = b'{"outputs":[{"name":"y","parameters":{"binary_data":true}}],"inputs":[%b]}' % tensor

    status, headers, content = serve(write_model()).ask("POST", INFER, text)

    size = int(headers["inference-header-content-length"])
    assert (status, len(content) - size) == (200, rows * 12)


WORD = "a" * (1 << 20)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"inputs": [TENSOR, TENSOR | {"name": WORD}]}, "unknown_input"),
        ({"inputs": [TENSOR], "outputs": [{"name": WORD}]}, "unknown_output"),
        ({"inputs": [TENSOR | {"datatype": WORD}]}, "bad_request"),
        ({"inputs": [TENSOR | {"name": WORD, "data": "x"}]}, "bad_request"),
        ({"inputs": [TENSOR | {"parameters": {"binary_data_size": WORD}}]}, "bad_request"),
        ({"inputs": [TENSOR], "parameters": {"timeout": WORD}}, "bad_request"),
        ({"inputs": [TENSOR], "parameters": {"binary_data_output": WORD}}, "bad_request"),
        ({"inputs": [TENSOR], "parameters": {"sequence_" + WORD: 1}}, "unsupported"),
    ],
)
def test_a_long_word_of_a_request_is_told_back_cut(served: Any, change: Any, code: str) -> None:
    _, said = served.json("POST", INFER, change)

    assert code in said["error"]
    assert len(said["error"]) < 400


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (f"/v2/models/{WORD[:60_000]}/infer", {}),
        (f"/v2/models/same/versions/{WORD[:60_000]}", {}),
        (f"/v2/models/same/versions/{WORD[:60_000]}/infer", {}),
        (f"/{WORD[:60_000]}", {}),
        (f"/v2/{WORD[:60_000]}/config", {}),
        (INFER, {"Content_Encoding": WORD[:60_000]}),
        (INFER, {"Inference_Header_Content_Length": WORD[:60_000]}),
    ],
)
def test_a_long_word_of_a_head_is_told_back_cut(
    served: Any, path: str, headers: dict[str, str]
) -> None:
    for method in ("GET", "POST"):
        _, said = served.json(method, path, BODY, **headers)
        assert len(str(said)) < 400
