"""The configuration: what is read, and how each mistake is named."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from edge_runtime import config
from edge_runtime.errors import ConfigError

GOOD = """
device = "EWR"
families = ["flight_delay"]
state_dir = "state"
socket = "edge.sock"
"""


def parse(text: str, folder: Path = Path("/etc/edge")) -> config.EdgeConfig:
    return config.parse(text, folder / "edge.toml")


def test_relative_paths_stand_beside_the_file() -> None:
    found = parse(GOOD)
    assert found.state_dir == Path("/etc/edge/state")
    assert found.socket == Path("/etc/edge/edge.sock")


def test_keys_and_certificates_stand_beside_the_file_too() -> None:
    tls = 'tls_ca = "ca.pem"\ntls_cert = "tls/cert.pem"\ntls_key = "/run/key.pem"\n'
    found = parse(GOOD + '[broker]\nkey = "device.nk"\n' + tls)
    assert found.broker == config.BrokerConfig(
        key=Path("/etc/edge/device.nk"),
        tls_ca=Path("/etc/edge/ca.pem"),
        tls_cert=Path("/etc/edge/tls/cert.pem"),
        tls_key=Path("/run/key.pem"),
    )
    assert parse(GOOD).broker == config.BrokerConfig()
    assert parse(GOOD).own_key == Path("/etc/edge/state/device.nk")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('key = "a"\ncredentials = "b"\n', "two_identities"),
        ('tls_cert = "a"\n', "half_a_certificate"),
        ('tls_key = "a"\n', "half_a_certificate"),
        ('tls_kee = "a"\n', "unknown_key"),
        ('key = ""\n', "bad_value"),
    ],
)
def test_a_broker_section_that_cannot_work_is_refused(text: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD + "[broker]\n" + text)
    assert caught.value.code == code
    assert "broker" in caught.value.message


def test_absolute_paths_are_kept() -> None:
    found = parse(GOOD.replace('"state"', '"/var/lib/edge"'))
    assert found.state_dir == Path("/var/lib/edge")


def test_without_a_broker_no_root_is_needed() -> None:
    found = parse(GOOD)
    assert (found.nats, found.root) == ("", None)


def test_all_keys_are_read() -> None:
    found = parse(
        GOOD
        + 'nats = "nats://127.0.0.1:4222"\nroot = "root.json"\npoll_s = 5\n'
        + 'socket_mode = "0660"\nsocket_group = "video"\n'
        + '[attributes]\nairport = "EWR"\n'
        + "[log]\nlinger_ms = 2\nlinger_max_ms = 20\nbytes_max_mb = 64\n"
        + '[http]\nport = 8080\nsocket = "http.sock"\nbody_max_mb = 1\n'
        + "[inference]\nqueue_max = 8\nbatch_rows_max = 4\nbatch_delay_us = 500\ndeadline_ms = 90\n"
        + '[logging]\nformat = "json"\nlevel = "debug"\n'
        + "[uplink.flight_delay]\nsample = 0.25\nbytes_per_day = 1000000\n"
        + 'redact = ["carrier"]\n'
        + "[rollout]\nhold = true\nstep_max = 12.5\n"
    )
    assert found.attributes == {"airport": "EWR"}
    assert (found.socket_bits, found.socket_group) == (0o660, "video")
    assert found.log == config.LogConfig(linger_ms=2, linger_max_ms=20, bytes_max_mb=64)
    assert found.http == config.HttpConfig(8080, Path("/etc/edge/http.sock"), 1)
    assert found.inference == config.InferenceConfig(8, 4, 500, 90)
    assert found.logging == config.LoggingConfig("json", "debug")
    assert found.uplink == {"flight_delay": config.UplinkConfig(0.25, ["carrier"], 1_000_000)}
    assert found.rollout == config.RolloutConfig(hold=True, step_max=12.5)
    assert found.root == Path("/etc/edge/root.json")
    assert found.poll_s == 5.0


def test_by_itself_a_device_obeys_every_step() -> None:
    assert parse(GOOD).rollout == config.RolloutConfig(hold=False, step_max=100.0)
    for text in ("step_max = 101", "step_max = -1", "hold = 1"):
        with pytest.raises(ConfigError, match=f"rollout.{text.split()[0]}"):
            parse(f"{GOOD}[rollout]\n{text}\n")


def test_http_is_served_only_when_a_place_is_named() -> None:
    assert not parse(GOOD).http.enabled
    assert parse(GOOD + "[http]\nport = 0").http.enabled
    assert parse(GOOD + "[http]\nsocket = 'http.sock'").http.enabled


def test_a_local_configuration_serves_one_file_and_asks_nobody(tmp_path: Path) -> None:
    found = config.local_config(tmp_path / "my.onnx", "my", tmp_path / "state")
    assert (found.package, found.families) == (tmp_path / "my.onnx", ["my"])
    assert (found.nats, found.root, found.http.enabled) == ("", None, False)
    assert found.socket == tmp_path / "state" / "edge.sock"


def test_a_local_configuration_takes_paths_from_where_one_stands(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        found = config.local_config(
            Path("my.onnx"),
            "my",
            Path("state"),
            socket=Path("a.sock"),
            http=config.HttpConfig(socket=Path("http.sock")),
        )
    assert (found.package, found.socket) == (tmp_path / "my.onnx", tmp_path / "a.sock")
    assert (found.state_dir, found.http.socket) == (tmp_path / "state", tmp_path / "http.sock")


def test_a_local_family_must_have_a_name_that_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.local_config(tmp_path / "my.onnx", "my model", tmp_path)
    assert caught.value.code == "bad_name"


def test_the_same_text_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(GOOD)
    assert config.load(tmp_path / "edge.toml") == parse(GOOD, tmp_path)


@pytest.mark.parametrize(
    ("extra", "code", "names", "hint"),
    [
        ("sokcet = 'x'", "unknown_key", "sokcet", "did you mean socket?"),
        ("[log]\nlinger = 1", "unknown_key", "log.linger", "did you mean log.linger_ms?"),
        ("poll_s = 'often'", "bad_value", "poll_s: expected", ""),
        ("poll_s = 0", "bad_value", "poll_s: expected", ""),
        ("[log]\nlinger_ms = 5.5", "bad_value", "log.linger_ms: expected int", ""),
        ("[log]\nbytes_max_mb = 1", "bad_value", "log.bytes_max_mb: expected int", ""),
        ("package = 'x.onnx'", "unknown_key", "package", "keys: device"),
        ("[http]\nprot = 1", "unknown_key", "http.prot", "did you mean http.port?"),
        ("[http]\nport = 65536", "bad_value", "http.port: expected", ""),
        ("[http]\nsocket = 1", "bad_value", "http.socket: expected a path", ""),
        ("[http]\nsocket = 'edge.sock'", "socket_taken", "http.socket", "http.sock"),
        ("[http]\nbody_max_mb = 0", "bad_value", "http.body_max_mb: expected int", ""),
        ("[inference]\nqueue = 1", "unknown_key", "inference.queue", "inference.queue_max?"),
        ("[inference]\nqueue_max = 0", "bad_value", "inference.queue_max", ""),
        ("[inference]\nbatch_rows_max = 0", "bad_value", "inference.batch_rows_max", ""),
        ("[inference]\nbatch_delay_us = -1", "bad_value", "inference.batch_delay_us", ""),
        ("[inference]\ndeadline_ms = 0", "bad_value", "inference.deadline_ms", ""),
        ("[logging]\nformat = 'xml'", "bad_value", "logging.format: invalid enum", ""),
        ("[logging]\nlevle = 'info'", "unknown_key", "logging.levle", "logging.level?"),
        ("logging = 'json'", "bad_value", "logging: expected object", ""),
        ("socket_mode = '600'", "bad_value", "socket_mode: expected str", ""),
        ("[attributes]\nairport = 3", "bad_value", "attributes", ""),
        ("root = ''", "bad_value", "root: expected a path", ""),
        ("nats = 'nats://x'", "no_root", "root: missing", "1.root.json"),
        ("device = 'a'", "bad_toml", "Cannot overwrite", ""),
        ("poll_s = ", "bad_toml", "edge.toml", ""),
    ],
)
def test_a_mistake_is_named_with_file_and_key(extra: str, code: str, names: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD + extra)
    assert caught.value.code == code
    assert "/etc/edge/edge.toml" in caught.value.message
    assert names in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("key", ["device", "families", "state_dir", "socket"])
def test_a_missing_key_is_named(key: str) -> None:
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(key))
    with pytest.raises(ConfigError, match=f"missing required field {key}"):
        parse(text)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('"EWR"', '"E.WR"', "bad_name"),
        ('"EWR"', '""', "bad_name"),
        ('["flight_delay"]', '["flight delay"]', "bad_name"),
        ('["flight_delay"]', "[]", "bad_value"),
        ('"edge.sock"', f'"{"x" * 100}"', "socket_too_long"),
        ('"edge.sock"', f'"a"\nhttp.socket = "{"x" * 100}"', "socket_too_long"),
    ],
)
def test_a_value_that_cannot_work_is_refused(old: str, new: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(old, new))
    assert caught.value.code == code


def test_a_missing_file_hints_at_init(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "edge.toml")
    assert caught.value.code == "no_config"
    assert "edge-runtime init" in caught.value.hint


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "edge.toml")
    assert caught.value.code == "unreadable_config"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("sample = 1.5", "bad_value", "uplink.flight_delay.sample: expected float <= 1.0"),
        ("sample = -1", "bad_value", "uplink.flight_delay.sample: expected float >= 0.0"),
        ("bytes_per_day = 0", "bad_value", "uplink.flight_delay.bytes_per_day: expected int >= 1"),
        ('redact = "name"', "bad_value", "uplink.flight_delay.redact: expected array, got str"),
        ("sampel = 0.5", "unknown_key", "did you mean uplink.flight_delay.sample?"),
    ],
)
def test_a_mistake_in_an_uplink_rule_names_family_and_key(text: str, code: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD + f"[uplink.flight_delay]\n{text}\n")
    assert caught.value.code == code
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["[uplink.flights]\nsample = 1.0\n", "[uplink]\nsample = 1.0\n"])
def test_an_uplink_rule_for_no_family_of_this_device_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD + text)
    assert caught.value.code == "unknown_family"
    assert "one of: flight_delay" in caught.value.hint
