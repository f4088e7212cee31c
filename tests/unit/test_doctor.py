"""The doctor sees what is wrong: each check is shown what is right, and what is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime import config as configuration
from edge_runtime import doctor
from edge_runtime.clock import ManualClock
from edge_runtime.doctor import Finding

ROOT = Path(__file__).parents[2]
GOOD = 'device = "EWR"\nfamilies = ["toy"]\nstate_dir = "state"\nsocket = "edge.sock"\n'
AS_ROOT = os.getuid() == 0  # root may write everywhere: no folder can be closed to it


@pytest.fixture
def seen(tmp_path: Path) -> Callable[..., Finding]:
    """`seen("disk", "key = 1")` is what the doctor finds of it with that configuration."""

    def look(what: str, extra: str = "", *, text: str = GOOD) -> Finding:
        (tmp_path / "edge.toml").write_text(text + extra)
        config = configuration.load(tmp_path / "edge.toml")
        return doctor._looked(what, lambda: getattr(doctor, f"_{what}")(config))

    return look


@pytest.fixture
def server() -> Iterator[Callable[[bytes], str]]:
    """`server(greeting)` is the address of a real TCP server that says it to one caller."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def greet(listener: socket.socket, greeting: bytes) -> None:
        channel, _ = listener.accept()
        with channel:
            channel.sendall(greeting)

    def serve(greeting: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threads.append(threading.Thread(target=greet, args=(listener, greeting)))
        threads[-1].start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for thread in threads:
        thread.join(10)
    for listener in listeners:
        listener.close()


def found(findings: list[Finding]) -> dict[str, str]:
    return {each.what: each.state for each in findings}


def test_a_device_that_was_set_up_is_well(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(GOOD)
    findings = doctor.examine(tmp_path / "edge.toml")
    assert "fail" not in found(findings).values(), doctor.told(findings)
    assert [each.what for each in findings] == [
        *("python", "glibc", "cpu", "onnxruntime", "clock", "configuration"),
        *("state", "disk", "socket", "http", "root", "broker", "admission"),
    ]
    assert os.listdir(tmp_path) == ["edge.toml"]


def test_what_is_not_well_always_has_a_hint(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(GOOD + '[http]\nsocket = "gone/http.sock"\n')
    findings = doctor.examine(tmp_path / "edge.toml", ManualClock(0.0))
    assert {"clock", "socket"} <= {each.what for each in findings if each.state == "fail"}
    assert all(each.hint for each in findings if each.state != "ok")
    assert "fail  clock          1970-01-01 00:00:00 UTC is before" in doctor.told(findings)
    assert "hint: set the clock" in doctor.told(findings)


def test_without_a_configuration_the_machine_is_looked_at(tmp_path: Path) -> None:
    findings = doctor.examine(tmp_path / "edge.toml")
    assert found(findings)["configuration"] == "warn"
    assert "edge-runtime init" in findings[-1].hint
    assert "disk" not in found(findings)


def test_a_mistake_in_the_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(GOOD + "sokcet = 1")
    last = doctor.examine(tmp_path / "edge.toml")[-1]
    assert (last.what, last.state) == ("configuration", "fail")
    assert "sokcet" in last.text
    assert last.hint == "did you mean socket?"


def test_old_or_foreign_software_fails() -> None:
    assert doctor._python((3, 10, 9))[0] == "fail"
    assert doctor._python((3, 11, 0))[0] == "ok"
    assert [doctor._glibc(f"glibc 2.{minor}")[0] for minor in (17, 27, 28, 36)] == [
        *("fail", "fail", "ok", "ok")
    ]
    assert doctor._glibc("musl 1.2")[0] == "fail"
    assert doctor._glibc("")[0] == "fail"


def test_what_the_processor_can_do_is_said() -> None:
    assert doctor._cpu(frozenset({"avx2", "avx512_vnni", "fpu"}), "x86_64")[0] == "ok"
    assert "avx2 avx512_vnni" in doctor._cpu(frozenset({"avx2", "avx512_vnni"}), "x86_64")[1]
    assert doctor._cpu(frozenset({"asimd"}), "aarch64")[0] == "ok"
    assert doctor._cpu(frozenset(), "x86_64")[0] == "warn"
    assert doctor._cpu(frozenset({"fpu"}), "riscv64")[0] == "fail"


def test_telemetry_of_onnx_runtime_is_seen_and_is_off_by_default() -> None:
    code = "from edge_runtime import doctor; print(doctor._onnxruntime()[0])"
    states = {
        setting: subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": setting},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for setting in ("1", "0")
    }
    assert states["1"] == "ok"
    if states["0"] == "ok":
        pytest.skip("this wheel of ONNX Runtime reports nothing")
    assert states["0"] == "warn"


def test_a_clock_before_the_installation_fails(tmp_path: Path) -> None:
    (tmp_path / "built").touch()
    built_s = (tmp_path / "built").stat().st_mtime
    assert doctor._clock(ManualClock(built_s - 1), tmp_path / "built")[0] == "fail"
    assert doctor._clock(ManualClock(built_s + 1), tmp_path / "built")[0] == "ok"


def test_a_check_that_cannot_look_says_so() -> None:
    seen = doctor._looked("clock", lambda: doctor._clock(ManualClock(), Path("/none")))
    assert (seen.what, seen.state) == ("clock", "fail")
    assert "/none" in seen.text


def test_state_on_a_disk_is_well_and_in_memory_is_not(seen: Callable[..., Finding]) -> None:
    assert seen("state").state in {"ok", "warn"}
    if doctor._file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    in_memory = seen("state", text=GOOD.replace('"state"', '"/dev/shm/headwater-none"'))
    assert in_memory.state == "warn"
    assert "tmpfs" in in_memory.text


@pytest.mark.skipif(AS_ROOT, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_fails(
    seen: Callable[..., Finding], tmp_path: Path
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert seen("state", text=GOOD.replace('"state"', '"closed/state"')).state == "fail"
    assert seen("socket", text=GOOD.replace('"edge.sock"', '"closed/edge.sock"')).state == "fail"


def test_the_disk_is_measured_and_must_hold_the_log(seen: Callable[..., Finding]) -> None:
    small = seen("disk", "[log]\nbytes_max_mb = 32\n")
    assert "making durable takes" in small.text
    huge = seen("disk", f"[log]\nbytes_max_mb = {1 << 40}\n")
    assert huge.state == "warn"
    assert "lower log.bytes_max_mb" in huge.hint


def test_a_socket_needs_a_folder_a_free_name_and_a_group(
    seen: Callable[..., Finding], tmp_path: Path
) -> None:
    assert "nobody answers" in seen("socket").text
    assert seen("socket", "[http]\nsocket = 'gone/http.sock'").hint == f"mkdir -p {tmp_path}/gone"
    assert seen("socket", "socket_group = 'no-such-group'").state == "fail"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "edge.sock"))
        listener.listen()
        assert "a device answers there" in seen("socket").text
    (tmp_path / "edge.sock").unlink()
    (tmp_path / "edge.sock").touch()
    assert seen("socket").text.endswith("edge.sock is no socket")


def test_http_is_well_where_its_libraries_are(seen: Callable[..., Finding]) -> None:
    assert seen("http").text == "not served"
    pytest.importorskip("httptools")
    assert seen("http", "[http]\nport = 8080").state == "ok"


def test_http_without_its_libraries_fails(tmp_path: Path) -> None:
    config = configuration.parse(GOOD + "[http]\nport = 8080", tmp_path / "edge.toml")
    state, text, hint = doctor._http(config, ("json", "no_such_library"))
    assert (state, text) == ("fail", "no_such_library missing")
    assert "headwater[http]" in hint


@pytest.mark.parametrize(
    ("content", "state"),
    [
        (b'{"signed": {"_type": "root"}}', "ok"),
        (b'{"signed": {"_type": "targets"}}', "fail"),
        (b"{}", "fail"),
        (b"\xff", "fail"),
        (None, "fail"),
    ],
)
def test_the_root_of_trust_must_be_one(
    seen: Callable[..., Finding], tmp_path: Path, content: bytes | None, state: str
) -> None:
    if content is not None:
        (tmp_path / "root.json").write_bytes(content)
    assert seen("root", 'nats = "nats://127.0.0.1:1"\nroot = "root.json"\n').state == state
    assert seen("root").state == "ok"


def test_a_broker_is_known_by_its_greeting(
    seen: Callable[..., Finding], server: Callable[[bytes], str]
) -> None:
    def asked(address: str) -> Finding:
        return seen("broker", f'nats = "nats://{address}"\nroot = "root.json"\n')

    assert asked(server(b'INFO {"server_id":"x"} \r\n')).state == "ok"
    other = asked(server(b"220 smtp ready\r\n"))
    assert (other.state, "no NATS server" in other.text) == ("fail", True)
    assert asked(server(b"")).state == "fail"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = asked(f"127.0.0.1:{closed.getsockname()[1]}")
    assert (refused.state, "refused" in refused.text) == ("fail", True)
    assert "nats-server" in refused.hint
    assert seen("broker").state == "ok"
