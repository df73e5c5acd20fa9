"""The server before its model is there, and without one."""

from pathlib import Path

from tests.process import START_S, Server


def test_a_request_that_comes_while_the_model_loads_is_answered(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        assert server.ask("Hello").status_code == 200
        assert server.stream("Hello")[-1] == "[DONE]"


def test_without_its_model_it_says_why(tmp_path: Path) -> None:
    with Server(tmp_path, "--model", str(tmp_path / "nowhere")) as server:
        server.wait_for("model_failed", START_S)
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "failed")
        assert "nowhere" in ready.json()["failure"]
        assert server.get("/healthz").status_code == 200
        assert server.get("/v1/models").json()["data"][0]["status"] == "failed"
        for stream in (False, True):
            refused = server.ask("Hello", stream=stream)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "failed"
            assert "nowhere" in refused.json()["error"]["message"]
        server.signal()
        assert server.wait(10) == 0
