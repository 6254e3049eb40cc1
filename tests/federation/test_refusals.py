"""What a node says when a SuperLink does not take it: of lines that Flower 1.41 printed in each case."""

from __future__ import annotations

import pytest

from twist_fl.federation.refusals import refusal, waiting

SECURE = ["--superlink", "lab:8000", "--root-certificates", "ca.crt", "--auth-supernode-private-key", "node0"]
INSECURE = ["--insecure", "--superlink", "lab:8000"]


@pytest.mark.parametrize(
    ("line", "arguments", "words"),
    [
        ("[code: 2004] Failed to activate SuperNode.", SECURE, "it is not registered (where runs are started: "
         "`flwr supernode register node0.pub NAME`), or a node with the same key is already online"),
        ("[code: 2001] SuperNode authentication is enabled. All SuperNodes must be registered via the CLI.", SECURE[:4],
         "this one showed no key: give it with --auth-supernode-private-key"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate", SECURE,
         "is not signed by the CA in ca.crt: give the CA certificate"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate",
         SECURE[:2], "is not signed by a CA that this system knows"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch, certificate is not valid for "
         "'lab'.", SECURE, "is not for the name in --superlink lab:8000"),
        ("Unable to parse the private key file.", SECURE, "--auth-supernode-private-key node0 is not the private key"),
        ("[code: 1001] Runtime version compatibility check failed.", SECURE, "different versions of Flower: install "
         "the same on both (here it is 1.41.0)"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_wrong_and_what_to_do(line: str, arguments: list[str], words: str) -> None:
    assert words in str(refusal(line, arguments, "1.41.0"))
    assert waiting(line, arguments) is None


def test_a_node_that_tries_again_says_what_it_may_be() -> None:
    line = "WARNING: Connection attempt failed, retrying in 0.80 seconds"
    assert refusal(line, INSECURE, "1.41.0") is None
    assert str(waiting(line, INSECURE)).startswith("no answer from a SuperLink at lab:8000 yet: it is not running, ")
    assert "leave out --insecure" in str(waiting(line, INSECURE))
    assert "give --insecure" in str(waiting(line, SECURE))


@pytest.mark.parametrize("line", ["", "INFO: Received: train message 2001", "Sent successfully"])
def test_other_lines_say_nothing(line: str) -> None:
    assert refusal(line, SECURE, "1.41.0") is None
    assert waiting(line, SECURE) is None
