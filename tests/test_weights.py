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
import torch
import torchvision
from torch import Tensor
from torchvision.models import Weights, WeightsEnum
from torchvision.transforms._presets import ImageClassification

import tuneapp.weights as weights_module
from tuneapp.data.source import ImageSet
from tuneapp.data.store import Preprocessing
from tuneapp.errors import WeightsError
from tuneapp.models import build_network
from tuneapp.weights import fetch, find_weights, load_weights, preprocessing_of, read_state_dict

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


# --- Reading a file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five_classes() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(build_network("resnet18", 5).state_dict())


def saved(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


def test_a_head_of_another_size_is_replaced_and_said(
    five_classes: dict[str, Tensor], tmp_path: Path
) -> None:
    network = build_network("resnet18", 3)
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = load_weights(network, "resnet18", saved(five_classes, tmp_path / "five.pt"))
    for name, tensor in network.state_dict().items():
        wanted = fresh if name.startswith("fc.") else five_classes
        assert torch.equal(tensor, wanted[name]), name
    assert report.other_shape == ("fc.weight", "fc.bias")
    assert set(report.loaded) == set(five_classes) - {"fc.weight", "fc.bias"}
    assert (report.missing, report.unexpected) == ((), ())
    assert str(report) == "120 tensors loaded; 2 of another shape (fc.weight, fc.bias)"


def test_a_head_of_the_same_size_is_kept(five_classes: dict[str, Tensor], tmp_path: Path) -> None:
    network = build_network("resnet18", 5)
    load_weights(network, "resnet18", saved(five_classes, tmp_path / "five.pt"))
    assert all(torch.equal(t, five_classes[n]) for n, t in network.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    ],
    ids=["parallel", "state_dict", "model", "both"],
)
def test_a_state_dict_is_found_in_its_usual_wrappings(
    wrap: Callable[[dict[str, Tensor]], object], five_classes: dict[str, Tensor], tmp_path: Path
) -> None:
    file = saved(wrap(five_classes), tmp_path / "wrapped.pt")
    state = read_state_dict(file, file.stat().st_mtime_ns)
    assert state.keys() == five_classes.keys()
    assert all(torch.equal(state[name], five_classes[name]) for name in state)


def test_missing_and_foreign_tensors_are_said(
    five_classes: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {k: v for k, v in five_classes.items() if k not in ("bn1.weight", "fc.bias")}
    state["aux.weight"] = torch.zeros(2)
    report = load_weights(
        build_network("resnet18", 5), "resnet18", saved(state, tmp_path / "some.pt")
    )
    assert report.missing == ("bn1.weight", "fc.bias")
    assert report.unexpected == ("aux.weight",)


@pytest.mark.parametrize("model", ["mobilenet_v3_small", "wide_resnet50_2"])
def test_a_file_of_another_network_is_refused_by_name(model: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.get_model(model).state_dict()
    # Expanded from one zero, so that the file holds shapes and hardly a byte.
    state = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}
    file = saved(state, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other\.pt fits \d+% of resnet18's backbone: .*other"):
        load_weights(build_network("resnet18", 5), "resnet18", file)


def cut_in_half(file: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(bytes(range(256)) * 20),
        lambda file: file.write_text("<!DOCTYPE html><html>Please log in</html>"),
        lambda file: file.write_bytes(b""),
        cut_in_half,
        lambda file: torch.save({"epoch": 3}, file),
        lambda file: torch.save([torch.zeros(2)], file),
        lambda file: torch.save({}, file),
    ],
    ids=["garbage", "html", "empty", "truncated", "no tensors", "a list", "nothing"],
)
def test_a_file_that_holds_no_state_dict_is_refused_by_name(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    file = tmp_path / "spoilt.pt"
    spoil(file)
    network = build_network("resnet18", 3)
    with pytest.raises(WeightsError, match=r"spoilt\.pt"):
        load_weights(network, "resnet18", file)


class Touch:
    """Unpickled as code, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.marker), "w")


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = saved({"conv1.weight": torch.zeros(2), "extra": Touch(marker)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=r"evil\.pt"):
        read_state_dict(file, 0)
    assert not marker.exists()
    # The file does hold code: who trusts it runs it.
    torch.load(file, weights_only=False)["extra"].close()
    assert marker.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_with_the_name_of_their_tensor(
    value: float, tmp_path: Path
) -> None:
    spoilt = torch.zeros(3, 4)
    spoilt[1, 2] = value
    file = saved({"conv1.weight": torch.ones(2), "bn1.bias": spoilt}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt: bn1\.bias holds NaN or infinite"):
        read_state_dict(file, 0)


def test_a_file_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    for changed_ns, value in ((1, 3.0), (2, 4.0)):
        saved({"x": torch.tensor(value)}, file)
        assert float(read_state_dict(file, changed_ns)["x"]) == value


@pytest.mark.parametrize("name", ["plain.pt", "with-hash-{hash}.pt"])
def test_a_local_file_is_found_where_it_was_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name.format(hash=HASH)
    file.write_bytes(CONTENT)
    found = find_weights("resnet18", str(file))
    assert (found.file, found.name, found.warning) == (str(file.resolve()), "file", "")


@pytest.mark.parametrize("asked", ["nowhere.pt", "some/where"])
def test_a_file_that_is_not_there_is_named(asked: str) -> None:
    with pytest.raises(WeightsError, match=rf"'{asked}': no such file"):
        find_weights("resnet18", asked)


def test_random_weights_need_nothing(torch_home: Path) -> None:
    found = find_weights("resnet18", None)
    assert (found.file, found.name, found.warning) == (None, "random", "")
    assert not torch_home.exists()


@pytest.mark.parametrize(
    ("asked", "near"), [("IMAGENET1K_V3", "IMAGENET1K_V1"), ("DEFAUL", "DEFAULT")]
)
def test_unknown_weights_are_refused_with_the_nearest_name(asked: str, near: str) -> None:
    with pytest.raises(WeightsError, match=rf"'{asked}' of resnet18 .*did you mean '{near}'\?"):
        find_weights("resnet18", asked)


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
    monkeypatch.setattr(weights_module, "SILENCE_S", 0.2)
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


# --- torchvision's lists --------------------------------------------------------------------------


def offer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision's list for every model hold one entry, at `url`."""
    entry = Weights(url=url, transforms=partial(ImageClassification, crop_size=224), meta={})

    class Tiny_Weights(WeightsEnum):  # noqa: N801 - torchvision's way of naming them
        IMAGENET1K_V1 = entry
        DEFAULT = IMAGENET1K_V1

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda model: Tiny_Weights)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    offer(f"http://127.0.0.1:{port}/models/{GOOD_NAME}", monkeypatch)


@pytest.mark.parametrize("asked", ["auto", "DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_are_fetched_to_torchs_own_folder(
    asked: str, server: Server, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(server.url(GOOD_NAME), monkeypatch)
    server.answers[GOOD_NAME] = send
    found = find_weights("resnet18", asked)
    assert found.file == str(torch_home / GOOD_NAME)
    assert (torch_home / GOOD_NAME).read_bytes() == CONTENT
    assert (found.asked, found.name, found.warning) == (asked, "Tiny_Weights.IMAGENET1K_V1", "")
    assert find_weights("resnet18", asked) == found
    assert server.asked == {GOOD_NAME: 1}


@pytest.mark.usefixtures("offline")
def test_auto_without_network_is_random_with_a_warning_that_says_where_to_put_the_file(
    torch_home: Path,
) -> None:
    found = find_weights("resnet18", "auto")
    assert (found.file, found.name) == (None, "random")
    assert "resnet18 starts from RANDOM weights" in found.warning
    assert f"put the file at {torch_home / GOOD_NAME}" in found.warning


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("asked", ["DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_without_network_are_an_error_that_says_where_to_put_the_file(
    asked: str, torch_home: Path
) -> None:
    with pytest.raises(WeightsError) as caught:
        find_weights("resnet18", asked)
    assert f"put the file at {torch_home / GOOD_NAME}" in str(caught.value)
    assert "cannot be fetched" in str(caught.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("asked", ["auto", "DEFAULT"])
def test_a_file_that_is_there_needs_no_network(asked: str, torch_home: Path) -> None:
    torch_home.mkdir(parents=True)
    (torch_home / GOOD_NAME).write_bytes(CONTENT)
    assert find_weights("resnet18", asked).file == str(torch_home / GOOD_NAME)


@pytest.mark.usefixtures("offline")
def test_a_cached_file_is_verified_each_time_it_is_found(torch_home: Path) -> None:
    torch_home.mkdir(parents=True)
    (torch_home / GOOD_NAME).write_bytes(CONTENT)
    find_weights("resnet18", "DEFAULT")
    (torch_home / GOOD_NAME).write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(WeightsError, match=rf"{GOOD_NAME} is damaged: .*{HASH}; delete it"):
        find_weights("resnet18", "DEFAULT")
    found = find_weights("resnet18", "auto")
    assert found.file is None
    assert "is damaged" in found.warning


def test_every_offered_file_of_torchvision_has_a_hash_in_its_name() -> None:
    for model in ("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"):
        for entry in torchvision.models.get_model_weights(model):
            assert weights_module._HASH_IN_NAME.search(entry.url), entry


# --- Preprocessing --------------------------------------------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("model", "asked", "image_size", "native_size", "resize_and_crop"),
    [
        # From torchvision's documentation of each weights entry.
        ("resnet18", "DEFAULT", None, None, (256, 224)),
        ("resnet18", "auto", None, None, (256, 224)),
        ("resnet18", None, None, None, (256, 224)),
        ("resnet18", "my/file.pt", None, None, (256, 224)),
        ("resnet50", "DEFAULT", None, None, (232, 224)),
        ("resnet50", "IMAGENET1K_V1", None, None, (256, 224)),
        ("resnet50", "IMAGENET1K_V2", None, None, (232, 224)),
        # The proportion of resize to crop is kept: 64 * 256 / 224 = 73.1, 64 * 232 / 224 = 66.3.
        ("resnet18", "DEFAULT", 64, None, (73, 64)),
        ("resnet50", "DEFAULT", 64, None, (66, 64)),
        ("resnet50", "IMAGENET1K_V1", 64, None, (73, 64)),
        ("resnet18", None, 32, None, (37, 32)),
        ("resnet18", None, 448, None, (512, 448)),
        # The embedded scans are framed already: enlarged, nothing cropped away.
        ("resnet18", None, None, 32, (32, 32)),
        # Scans of one size are framed already: nothing is cropped away.
        ("resnet18", "DEFAULT", 64, 32, (64, 64)),
        ("resnet18", "DEFAULT", 224, 32, (256, 224)),
    ],
)
def test_images_are_prepared_as_the_weights_were_evaluated(
    model: str,
    asked: str | None,
    image_size: int | None,
    native_size: int | None,
    resize_and_crop: tuple[int, int],
) -> None:
    got = preprocessing_of(model, asked, image_size, native_size)
    assert got == Preprocessing(*resize_and_crop, "bilinear", *IMAGENET)


def test_the_embedded_scans_say_their_size_and_folders_do_not() -> None:
    assert ImageSet(None, ("0", "1"), ()).native_size == 32
    assert ImageSet(Path("x"), ("0", "1"), ()).native_size is None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("resnet50", "resnet18"), ("resnext50_32x4d", "wide_resnet50_2"), ("resnet34", "resnet50")],
)
def test_a_relative_of_the_network_is_another_network(
    theirs: str, ours: str, tmp_path: Path
) -> None:
    # Most of their tensors have the same names and shapes.
    file = tmp_path / "weights.pth"
    torch.save(build_network(theirs, 3).state_dict(), file)
    with pytest.raises(WeightsError, match="it belongs to another network"):
        load_weights(build_network(ours, 3), ours, file)


def test_a_date_in_the_name_of_a_user_s_file_is_no_hash(tmp_path: Path) -> None:
    file = tmp_path / "best-20240131.pt"
    torch.save(build_network("resnet18", 3).state_dict(), file)
    assert len(load_weights(build_network("resnet18", 3), "resnet18", file).loaded) == 122


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
