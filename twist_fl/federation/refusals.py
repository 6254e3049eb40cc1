"""Why a SuperLink does not take a node, in plain words: found in what Flower's SuperNode prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_REFUSED = {
    r"\[code: 2001\]": "the SuperLink takes registered nodes only, and this one showed no key: give it with "
    "--auth-supernode-private-key, and register it with `flwr supernode register KEY.pub NAME`",
    r"\[code: 2004\]": "the SuperLink does not take this node's key: it is not registered (where runs are started: "
    "`flwr supernode register {key} NAME`), or a node with the same key is already online",
    r"Hostname mismatch|IP address mismatch": "the SuperLink's certificate is not for the name in "
    "--superlink {superlink}: use a name that it has, or make it for this one (twist-fl federation init --host)",
    r"CERTIFICATE_VERIFY_FAILED": "the SuperLink's certificate is not signed by {ca}: give the CA certificate that it "
    "was signed with, as --root-certificates ca.crt",
    r"[Vv]ersion compatibility check failed|runtime version mismatch": "this node and the SuperLink have different "
    "versions of Flower: install the same on both (here it is {flower})",
    r"Unable to parse the private key file": "--auth-supernode-private-key {private} is not the private key of a node: "
    "give the file without .pub; twist-fl federation init makes one",
}
_WAITING = r"Connection attempt failed"
_NO_TLS = "it is not running, cannot be reached, or speaks TLS (then leave out --insecure and give --root-certificates)"
_TLS = "it is not running, cannot be reached, or speaks no TLS (then give --insecure)"


def refusal(line: str, arguments: Sequence[str], flower: str) -> str | None:
    """What a line of the SuperNode's output comes to, if it says that the node cannot join.

    `arguments` are the SuperNode's; `flower` is the version installed here.
    """
    given = dict(pairwise(arguments))
    private, certificates = given.get("--auth-supernode-private-key", ""), given.get("--root-certificates")
    words = {
        "superlink": given.get("--superlink", ""),
        "private": private,
        "key": f"{private or 'KEY'}.pub",
        "ca": f"the CA in {certificates}" if certificates else "a CA that this system knows",
        "flower": flower,
    }
    return next((text.format(**words) for form, text in _REFUSED.items() if re.search(form, line)), None)


def waiting(line: str, arguments: Sequence[str]) -> str | None:
    """The same if it says that the node tries again."""
    if not re.search(_WAITING, line):
        return None
    superlink = dict(pairwise(arguments)).get("--superlink", "")
    return f"no answer from a SuperLink at {superlink} yet: {_NO_TLS if '--insecure' in arguments else _TLS}"
