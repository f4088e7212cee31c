"""What is seen in an operator's server configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud_learner.cli import main
from cloud_learner.server_check import check
from edge_runtime.errors import ConfigError

GOOD = """
# js_ack_fc_v2: true
jetstream { store_dir: "/srv/nats", sync_interval: always }
feature_flags { js_ack_fc_v2: false } // not js_ack_fc_v2: true
routes = [ nats://a:4222, nats://b:4222 ]
include ./headwater.conf
"""


@pytest.fixture
def config(tmp_path: Path):
    """`config(text)` is the path of a configuration beside an included one."""
    (tmp_path / "headwater.conf").write_text('accounts { HEADWATER { note: "js_ack_fc_v2" } }\n')

    def write(text: str) -> Path:
        path = tmp_path / "nats.conf"
        path.write_text(text)
        return path

    return write


def test_a_good_configuration_has_no_weakness(config):
    assert check(config(GOOD)) == []


@pytest.mark.parametrize(
    "flag",
    [
        *("js_ack_fc_v2: true", "js_ack_fc_v2 = yes", "js_ack_fc_v2 on", '"js_ack_fc_v2": true'),
        *("js_ack_fc_v2: TRUE", "js_ack_fc_v2: $FLAG", "JS_ACK_FC_V2: true"),
    ],
)
def test_the_second_form_of_acknowledgements_is_refused(config, flag):
    for text in (GOOD.replace("js_ack_fc_v2: false", flag), f"feature_flags {{ {flag} }}\n"):
        with pytest.raises(ConfigError) as caught:
            check(config(text))
        assert caught.value.code == "ack_v2"


def test_the_second_form_is_found_in_an_included_file_too(config, tmp_path):
    (tmp_path / "headwater.conf").write_text("feature_flags { js_ack_fc_v2: true }\n")
    with pytest.raises(ConfigError) as caught:
        check(config("include 'headwater.conf'\n"))
    assert caught.value.code == "ack_v2"


def test_what_weakens_a_promise_is_said(config):
    assert len(check(config("port: 4222\n"))) == 3
    assert check(config(GOOD.replace("sync_interval: always", ""))) == [
        "sync_interval is not always: a power cut may take what was acknowledged"
    ]
    with pytest.raises(ConfigError) as caught:
        check(config("include ./none.conf\n"))
    assert (caught.value.code, "none.conf" in caught.value.message) == ("unreadable_config", True)


def test_the_command_says_it_with_its_exit_code(config):
    def checked(text: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["broker-config", "--check", str(config(text))])
        return done.exit_code, done.stderr

    assert checked(GOOD) == (0, "")
    assert checked("port: 4222\n")[0] == 0
    code, said = checked("feature_flags { js_ack_fc_v2: true }\n")
    assert (code, "ack_v2" in said) == (2, True)
