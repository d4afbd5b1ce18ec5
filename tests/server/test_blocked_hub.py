"""While it serves, the server tells what blocks it."""

from __future__ import annotations

from server_process import ServerProcess, StartServer


def test_a_request_that_blocks_the_others_is_told_of(server: ServerProcess) -> None:
    assert server.request("/hold_hub")[1] == b"held"
    output = server.wait_for_output("WARNING puff_patch.hub: the hub was blocked for ")
    [line] = [line for line in output.splitlines() if "the hub was blocked" in line]
    assert "sample_app.py:" in line
    assert " in hold_hub" in line


def test_or_not_if_that_is_turned_off(start_server: StartServer) -> None:
    server = start_server(env={"PUFF_BLOCKED_HUB_MS": "0"})
    assert server.request("/hold_hub")[1] == b"held"
    assert server.stop() == 0
    assert "the hub was blocked" not in server.output()
