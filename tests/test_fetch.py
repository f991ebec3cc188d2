import contextlib
import hashlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torchvision

import tuneapp.fetch as fetch_module
from tuneapp.errors import WeightsError
from tuneapp.families import FAMILIES
from tuneapp.fetch import cached_or_fetched, check_hash, fetch, hub_dir, sha256_of

CONTENT = b"forty-two megabytes of weights, more or less"
HASH = hashlib.sha256(CONTENT).hexdigest()[:8]
GOOD_NAME = f"tiny-{HASH}.pth"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "torch"
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home / "hub" / "checkpoints"


# --- A real server --------------------------------------------------------------------------------


@dataclass
class Server:
    """An HTTP server on this machine: what it answers by path, and what it was asked."""

    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    gone: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


@pytest.fixture
def server() -> Iterator[Server]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            told.asked[name] += 1
            if name in told.answers:
                told.answers[name](self)
            else:
                self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        told.port = http.server_address[1]
        thread = threading.Thread(target=partial(http.serve_forever, poll_interval=0.02))
        thread.start()
        yield told
        told.gone.set()
        http.shutdown()
        thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes = CONTENT, pause_s: float = 0) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    time.sleep(pause_s)
    handler.wfile.write(content)


def left(folder: Path) -> list[str]:
    """What a download left: all but the lock, which is made to stay."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("name", [GOOD_NAME, "no_hash_in_the_name.pth"])
def test_a_download_is_whole_and_leaves_nothing_else(
    name: str, server: Server, tmp_path: Path
) -> None:
    server.answers[name] = send
    fetch(server.url(name), tmp_path / "new" / name, limit_s=10)
    assert (tmp_path / "new" / name).read_bytes() == CONTENT
    assert left(tmp_path / "new") == [name]


def stall(handler: BaseHTTPRequestHandler, server: Server) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(CONTENT)
    server.gone.wait(20)


def say_nothing(_: BaseHTTPRequestHandler, server: Server) -> None:
    server.gone.wait(20)


def break_off(handler: BaseHTTPRequestHandler, _: Server) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(CONTENT[:10])


def hang_up(_: BaseHTTPRequestHandler, __: Server) -> None:
    pass


def send_something_else(handler: BaseHTTPRequestHandler, _: Server) -> None:
    send(handler, b"<html>Please log in to the hotel's network</html>")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "Not Found"),
        (send_something_else, HASH),
        (stall, "timed out"),
        (say_nothing, "timed out"),
        (break_off, HASH),
        (hang_up, "closed connection"),
    ],
)
def test_a_failed_download_is_told_and_leaves_nothing(
    answer: Callable[[BaseHTTPRequestHandler, Server], None] | None,
    told: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch_module, "SILENCE_S", 0.2)
    if answer is not None:
        server.answers[GOOD_NAME] = lambda handler: answer(handler, server)
    began = time.monotonic()
    with pytest.raises(WeightsError, match=told):
        fetch(server.url(GOOD_NAME), tmp_path / GOOD_NAME, limit_s=None)
    assert time.monotonic() - began < 5
    assert left(tmp_path) == []


def test_a_download_that_takes_too_long_is_given_up(server: Server, tmp_path: Path) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        blocks = 100
        handler.send_response(200)
        handler.send_header("Content-Length", str(blocks << 20))
        handler.end_headers()
        for _ in range(blocks):
            if server.gone.wait(0.05):
                return
            try:
                handler.wfile.write(bytes(1 << 20))
            except OSError:
                return

    server.answers[GOOD_NAME] = trickle
    began = time.monotonic()
    with pytest.raises(WeightsError, match="took longer than"):
        fetch(server.url(GOOD_NAME), tmp_path / GOOD_NAME, limit_s=0.3)
    assert time.monotonic() - began < 4  # of the 5 s and more that it would take
    assert left(tmp_path) == []


def test_those_who_ask_at_once_fetch_once(server: Server, tmp_path: Path) -> None:
    server.answers[GOOD_NAME] = partial(send, pause_s=0.1)
    together = threading.Barrier(4)
    failures: list[Exception] = []

    def ask() -> None:
        together.wait()
        try:
            fetch(server.url(GOOD_NAME), tmp_path / GOOD_NAME, limit_s=10)
            assert (tmp_path / GOOD_NAME).read_bytes() == CONTENT
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert failures == []
    assert server.asked == {GOOD_NAME: 1}
    assert left(tmp_path) == [GOOD_NAME]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhalf a chunk",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\ntoo little",
        b"nothing like HTTP\r\n\r\n",
        b"",
    ],
    ids=["chunk cut off", "body cut off", "no status", "nothing"],
)
def test_a_broken_answer_is_an_error_of_the_weights(answer: bytes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        with pytest.raises(WeightsError, match=r"127\.0\.0\.1"):
            fetch(f"http://127.0.0.1:{port}/tiny.pth", tmp_path / "tiny.pth", 5)
        thread.join()
    assert not list(tmp_path.glob("*.pth"))
    assert not list(tmp_path.glob(".tiny.pth.*"))


def test_a_server_that_drips_does_not_outlast_the_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            with contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                for _ in range(100):
                    connection.sendall(b"drip")
                    time.sleep(0.05)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(WeightsError, match=r"took longer than 0\.3 s"):
            fetch(f"http://127.0.0.1:{port}/tiny.pth", tmp_path / "tiny.pth", 0.3)
        assert time.monotonic() - start < 3
        thread.join()


# --- torch's own folder ---------------------------------------------------------------------------


def test_a_file_is_fetched_to_torchs_own_folder_and_only_once(
    server: Server, torch_home: Path
) -> None:
    server.answers[GOOD_NAME] = send
    for _ in range(2):
        assert cached_or_fetched(server.url(GOOD_NAME), 10) == torch_home / GOOD_NAME
        assert (torch_home / GOOD_NAME).read_bytes() == CONTENT
    assert server.asked == {GOOD_NAME: 1}
    assert hub_dir() == torch_home


def test_a_file_that_cannot_be_fetched_is_an_error_that_says_where_to_put_it(
    server: Server, torch_home: Path
) -> None:
    with pytest.raises(WeightsError) as caught:
        cached_or_fetched(server.url(GOOD_NAME), 10)
    assert "Not Found" in str(caught.value)
    assert f"put the file at {torch_home / GOOD_NAME}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_there_needs_no_network(torch_home: Path) -> None:
    torch_home.mkdir(parents=True)
    (torch_home / GOOD_NAME).write_bytes(CONTENT)
    # Port 9 of this machine answers nobody.
    assert cached_or_fetched(f"http://127.0.0.1:9/{GOOD_NAME}", 1) == torch_home / GOOD_NAME


def test_a_file_that_is_there_is_verified_each_time(server: Server, torch_home: Path) -> None:
    server.answers[GOOD_NAME] = send
    cached_or_fetched(server.url(GOOD_NAME), 10)
    (torch_home / GOOD_NAME).write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(WeightsError, match=rf"{GOOD_NAME} is damaged: .*{HASH}; delete it"):
        cached_or_fetched(server.url(GOOD_NAME), 10)


# --- Hashes ---------------------------------------------------------------------------------------


def test_the_hash_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-4
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == wanted


def test_a_file_is_compared_with_the_hash_in_the_name_that_it_will_get(tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    aside.write_bytes(CONTENT)
    check_hash(aside, GOOD_NAME)
    check_hash(aside, "no_hash_in_the_name.pth")
    with pytest.raises(WeightsError, match=r"tiny-00000000\.pth is damaged"):
        check_hash(aside, "tiny-00000000.pth")


def test_every_offered_file_of_torchvision_has_a_hash_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    names = {e.url for m in FAMILIES for e in torchvision.models.get_model_weights(m)}
    assert len(names) > 80
    for url in names:
        with pytest.raises(WeightsError, match="is damaged"):
            check_hash(tmp_path / "empty", url.rsplit("/", 1)[-1])
