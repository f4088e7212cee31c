"""Why a dial failed, in our words."""

from __future__ import annotations

import ssl

import pytest
from nats import errors as nats_errors

from edge_runtime.bus.access import Identity
from edge_runtime.bus.answers import dial_error

HUNG_UP = [
    ConnectionResetError(104, "Connection reset by peer"),
    BrokenPipeError(32, "Broken pipe"),
    nats_errors.UnexpectedEOF(),
    nats_errors.ConnectionClosedError(),
]


@pytest.mark.parametrize("error", HUNG_UP, ids=repr)
def test_who_is_hung_up_on_under_tls_is_told_of_certificates(error):
    identity = Identity("", "", None, ssl.create_default_context())
    said = dial_error(error, "tls://127.0.0.1:4222", identity)
    assert said.code == "tls_failed"
    assert "tls_cert" in said.hint


@pytest.mark.parametrize("error", HUNG_UP, ids=repr)
def test_without_tls_nobody_is_told_of_certificates(error):
    said = dial_error(error, "nats://127.0.0.1:4222", Identity("", "", None, None))
    assert said.code == "unreachable"


def test_a_broker_that_is_not_there_is_no_matter_of_certificates():
    identity = Identity("", "", None, ssl.create_default_context())
    refused = ConnectionRefusedError(111, "Connect call failed")
    assert dial_error(refused, "tls://127.0.0.1:4222", identity).code == "unreachable"
