from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
from typing import Any

import pytest

from fedtune.errors import ProcessError, StudyError
from fedtune.processes import health
from fedtune.processes.health import Readiness

CANARY = "patient 4711"


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, json.loads(body) if body else None


def test_a_ready_role_is_alive_and_ready() -> None:
    with health.serve(0, lambda: Readiness(True, {"link": "ready"}, {"studies": 2})) as port:
        assert ask(port, "/health") == (200, {"alive": True})
        assert ask(port, "/ready") == (200, {"ready": True, "parts": {"link": "ready"}, "detail": {"studies": 2}})
        assert ask(port, "/ready", "HEAD") == (200, None)


def test_a_role_that_is_not_ready_is_alive_and_says_which_part() -> None:
    with health.serve(0, lambda: Readiness(False, {"link": "waiting"})) as port:
        assert ask(port, "/health")[0] == 200
        assert ask(port, "/ready") == (503, {"ready": False, "parts": {"link": "waiting"}, "detail": {}})


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError(CANARY), "process.internal"), (StudyError("unknown", CANARY), "study.unknown")]
)
def test_a_report_that_fails_is_not_ready_and_leaves_a_code_alone(error: Exception, code: str) -> None:
    def report() -> Readiness:
        raise error

    with health.serve(0, report) as port:
        assert ask(port, "/ready") == (503, {"ready": False, "code": code})
        assert ask(port, "/health")[0] == 200


def test_liveness_is_told_while_a_report_hangs() -> None:
    over = threading.Event()

    def report() -> Readiness:
        over.wait(10)
        return Readiness(True)

    with health.serve(0, report) as port:
        waiting = threading.Thread(target=ask, args=(port, "/ready"))
        waiting.start()
        assert ask(port, "/health")[0] == 200
        over.set()
        waiting.join()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 404), ("GET", "/ready/x", 404), ("POST", "/ready", 501)]
)
def test_there_is_nothing_else(method: str, path: str, status: int) -> None:
    with health.serve(0, lambda: Readiness(True)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request(method, path)
        assert connection.getresponse().status == status
        connection.close()


def test_a_page_under_another_name_reads_nothing() -> None:
    with health.serve(0, lambda: Readiness(True, {"study": CANARY})) as port:
        assert ask(port, "/ready", host="evil.example:80") == (421, {"code": "process.other-host"})
        assert ask(port, "/ready", host=f"localhost:{port}")[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_it_is_on_loopback_alone() -> None:
    with health.serve(0, lambda: Readiness(True)) as port, socket.socket() as other:
        other.bind(("127.0.0.2", port))
        other.listen()  # a listener on every address would not let it


def test_a_port_in_use_is_said() -> None:
    with health.serve(0, lambda: Readiness(True)) as port:
        with pytest.raises(ProcessError) as caught, health.serve(port, lambda: Readiness(True)):
            pass
        assert caught.value.code == "process.port-in-use"
        assert str(port) in caught.value.message


def test_a_client_that_says_nothing_does_not_hold_up_others_or_the_end() -> None:
    with health.serve(0, lambda: Readiness(True)) as port, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.send(b"GET /hea")
        assert ask(port, "/health")[0] == 200
    with pytest.raises(OSError, match=r"refused|reset"):
        ask(port, "/health")
