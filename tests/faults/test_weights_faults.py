"""Faults of pretrained weights: rows 21 to 27 of the fault catalogue."""

import hashlib
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tuneapp.fetch as fetch_module
from tests.faults.refusal import interrupt_after, refused, write_space
from tests.states import OWN, OwnNet, State, config_of, copied, empty_state, require_equal, saved
from tests.test_fetch import CONTENT, GOOD_NAME, Server, left, send, server  # noqa: F401 - fixture
from tests.test_prepare import prepared_of
from tests.test_weights import offer
from tuneapp import timm_models
from tuneapp.cli import main
from tuneapp.fetch import cached_or_fetched
from tuneapp.space import SearchSpace
from tuneapp.statedict import read_state_dict
from tuneapp.weights import load_weights

RESNET18 = "resnet18-f37072fd.pth"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps downloaded weights; there is none."""
    home = tmp_path_factory.mktemp("torch")
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home / "hub" / "checkpoints"


@pytest.fixture
def own_state() -> State:
    torch.manual_seed(6)
    return dict(OwnNet(3).state_dict())


def empty_state_of_timm(name: str) -> State:
    return copied(timm_models.build_timm(f"timm:{name}", 1000))


def with_weights(weights: str, model: str = OWN) -> str:
    """Write a space that starts from these weights; return its name."""
    space = Path(write_space(model=model))
    space.write_text(space.read_text().replace("weights=None", f"weights={weights!r}"))
    return str(space)


# --- 21: code in a file ---------------------------------------------------------------------------


class Touch:
    """Unpickled as code, it makes a file in the working directory."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch MARKER",)


def old_tar(file: Path) -> None:
    """As torch saved before 2017: a tar of pickles."""
    with tarfile.open(file, "w") as content:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = len(pickle.dumps(Touch()))
            content.addfile(member, io.BytesIO(pickle.dumps(Touch())))


EVIL: dict[str, Callable[[Path], object]] = {
    "new.pth": lambda file: torch.save({"stem.0.weight": torch.ones(2), "x": Touch()}, file),
    "bare.pt": lambda file: torch.save(Touch(), file),
    "legacy.pth": lambda file: torch.save(
        {"x": Touch()}, file, _use_new_zipfile_serialization=False
    ),
    "raw.pkl": lambda file: file.write_bytes(pickle.dumps({"x": Touch()})),
    "text.pkl": lambda file: file.write_bytes(pickle.dumps({"x": Touch()}, protocol=0)),
    "old.tar": old_tar,
    "array.npy": lambda file: np.save(file, np.array([Touch()], dtype=object)),
    "called.safetensors": lambda file: file.write_bytes(pickle.dumps({"x": Touch()})),
}


@pytest.mark.parametrize("name", EVIL)
def test_fault_21_code_in_a_file_of_weights_is_refused_and_not_run(
    name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EVIL[name](Path(name))
    error = refused(capsys, "sweep", with_weights(f"./{name}"), "--data", photos)
    assert str(Path(name).absolute()) in error
    assert "torch.save(model.state_dict()" in error
    assert not Path("MARKER").exists()
    if name.endswith(".pkl"):  # there is code in it: who trusts it runs it
        pickle.loads(Path(name).read_bytes())  # noqa: S301 - our own
        assert Path("MARKER").exists()


def test_fault_21_arguments_beside_weights_are_no_code(
    own_state: State, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As torchvision's references/classification/train.py and timm's train.py save them.
    for args in (Namespace(lr=0.1, data_path="/data"), Namespace(run=Touch())):
        saved({"model": own_state, "args": args, "epoch": 3}, Path("model_3.pth"))
        words = ["train", with_weights("./model_3.pth"), "--data", str(photos), "--epochs", "1"]
        if hasattr(args, "lr"):
            assert main([*words, "--name", "x"]) == 0
        else:
            error = refused(capsys, *words)
            assert "model_3.pth holds a pickled object (posix.system), which could run" in error
    assert not Path("MARKER").exists()


# --- 22, 23: what the cache and the network hold --------------------------------------------------


def halved(file: Path) -> None:
    saved(empty_state("resnet18"), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


SPOILT: dict[str, Callable[[Path], object]] = {
    "truncated": halved,
    "empty": lambda file: file.write_bytes(b""),
    "a page": lambda file: file.write_text("<!DOCTYPE html><html>Please log in</html>"),
    "another": lambda file: saved(empty_state("resnet18"), file),  # loads without a complaint
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_fault_22_a_cached_file_that_is_not_what_its_name_says_is_refused(
    spoil: Callable[[Path], object],
    cache: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache.mkdir(parents=True)
    spoil(cache / RESNET18)
    content = (cache / RESNET18).read_bytes()
    error = refused(capsys, "sweep", with_weights("DEFAULT", "resnet18"), "--data", photos)
    assert f"{cache / RESNET18} is damaged" in error
    begins = hashlib.sha256(content).hexdigest()[:8]
    assert f"begins with {begins}, but its name says f37072fd" in error
    assert "delete it" in error
    assert [path.name for path in cache.iterdir()] == [RESNET18]
    assert (cache / RESNET18).read_bytes() == content


@pytest.mark.parametrize("spoil", [SPOILT["empty"], SPOILT["another"]], ids=["empty", "another"])
def test_fault_22_a_file_that_changes_under_a_run_is_noticed_when_it_goes_on(
    spoil: Callable[[Path], object],
    own_state: State,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = saved(own_state, Path("own.pth").absolute())
    words = ["train", with_weights("./own.pth"), "--data", str(photos), "--name", "x"]
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert main(words) == 130
    content = file.read_bytes()
    spoil(file)
    error = refused(capsys, "resume", "runs/x")
    assert f"weights {file} have changed since this run began" in error
    file.write_bytes(content)
    assert main(["resume", "runs/x"]) == 0


def test_fault_22_a_bit_that_flipped_in_a_file_of_ones_own_is_noticed(
    own_state: State, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_state["head.1.weight"] = torch.ones(6, 8)
    file = saved(own_state, Path("own.pth"))
    content = bytearray(file.read_bytes())
    content[content.index(torch.ones(6, 8).numpy().tobytes()) + 50] ^= 16
    file.write_bytes(bytes(content))
    torch.load(file, weights_only=True)  # without a word
    error = refused(capsys, "sweep", with_weights("./own.pth"), "--data", photos)
    assert f"{file.absolute()} is damaged: the checksum of own/data/" in error


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "a Git LFS pointer: run `"),
        ("<!DOCTYPE html><html>Please log in</html>", "a web page, not weights"),
    ],
)
def test_fault_22_what_was_downloaded_in_place_of_weights_is_named(
    content: str, told: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.pth").write_text(content)
    error = refused(capsys, "sweep", with_weights("./own.pth"), "--data", photos)
    assert f"{Path('own.pth').absolute()} is {told}" in error


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize("kind", ["nobody listens", "nobody answers", "no such name"])
def test_fault_23_without_network_and_cache_the_message_says_where_to_put_the_file(
    kind: str,
    cache: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch_module, "SILENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = {
            "nobody listens": f"127.0.0.1:{closed_port()}",
            "nobody answers": f"127.0.0.1:{silent.getsockname()[1]}",
            "no such name": "no-such-host.invalid",
        }[kind]
        offer(f"http://{host}/{RESNET18}", monkeypatch)
        began = time.monotonic()
        error = refused(capsys, "sweep", with_weights("DEFAULT", "resnet18"), "--data", photos)
        assert time.monotonic() - began < 5
    assert f"http://{host}/{RESNET18} cannot be downloaded" in error
    assert f"put the file at {cache / RESNET18}" in error
    assert left(cache) == []


def test_fault_23_a_download_that_fails_is_not_tried_again_for_each_branch(
    cache: Path,
    photos: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(server.url(RESNET18), monkeypatch)  # which answers 404
    space = SearchSpace.read(Path(with_weights("auto", "resnet18")))
    prepared, _ = prepared_of(space, photos)
    (warning,) = [text for text in prepared.warnings if "RANDOM" in text]
    assert f"put the file at {cache / RESNET18}" in warning
    assert len(space.branches()) == 2
    assert server.asked == {RESNET18: 1}


# --- 24, 25: what the tensors are -----------------------------------------------------------------


def test_fault_24_weights_of_another_architecture_are_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(empty_state("resnet50"), Path("other.pth"))
    error = refused(capsys, "sweep", with_weights("./other.pth", "resnet18"), "--data", photos)
    assert f"{file.absolute()} fits" in error
    assert "it belongs to another network" in error
    assert "layer1.0.conv1.weight, " in error  # the first of what does not fit


def test_fault_24_a_head_of_other_classes_is_new_and_a_prefix_is_taken_off(
    own_state: State, tmp_path: Path
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in own_state.items()}
    network = OwnNet(5)
    fresh = copied(network)
    report = load_weights(network, config_of(OWN), saved(wrapped, tmp_path / "three.pt"))
    head = ("head.2.weight", "head.2.bias")
    require_equal(network, {**own_state, **{name: fresh[name] for name in head}})
    assert report.other_shape == head


def test_fault_24_a_part_of_a_network_is_refused_unless_it_is_asked_for(
    own_state: State, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The row wants 99 % of the backbone; documented is half of it, with a warning below all.
    part = {name: tensor for name, tensor in own_state.items() if name.startswith("stem.1.")}
    saved(part, Path("part.pth"))
    error = refused(capsys, "sweep", with_weights("./part.pth"), "--data", photos)
    assert "of tests.states:OwnNet's backbone" in error
    assert "to load the tensors that fit anyway, set partial_weights=True" in error
    space = Path(with_weights("./part.pth"))
    space.write_text(
        space.read_text().replace("freeze_depth", "partial_weights=True, freeze_depth")
    )
    words = ["train", str(space), "--data", str(photos), "--epochs", "1", "--name", "x"]
    assert main(words) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_fault_25_numbers_that_are_not_finite_are_refused_by_the_name_of_their_tensor(
    name: str,
    value: float,
    own_state: State,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own_state["body.0.bias"] = own_state["body.0.bias"].clone()
    own_state["body.0.bias"][3] = value
    file = saved(own_state, Path(name))
    error = refused(capsys, "sweep", with_weights(f"./{name}"), "--data", photos)
    assert f"{file.absolute()}: body.0.bias holds NaN or infinite values" in error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_fault_25_weights_of_another_precision_become_float32(
    dtype: torch.dtype, name: str, own_state: State, tmp_path: Path
) -> None:
    other = {k: t.to(dtype) if t.is_floating_point() else t for k, t in own_state.items()}
    network = OwnNet(3)
    load_weights(network, config_of(OWN), saved(other, tmp_path / name))
    require_equal(network, {k: t.to(own_state[k].dtype) for k, t in other.items()})
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_fault_25_numbers_of_another_kind_are_refused_by_the_name_of_their_tensor(
    dtype: torch.dtype, own_state: State, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_state["body.0.weight"] = own_state["body.0.weight"].to(dtype)
    saved(own_state, Path("w.pth"))
    error = refused(capsys, "sweep", with_weights("./w.pth"), "--data", photos)
    assert "1 of another kind of numbers (body.0.weight)" in error


def test_weights_that_timm_evaluates_without_a_crop_are_warned_of_once_in_a_run(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = timm_models.weights_of("timm:test_resnet")
    file = saved(empty_state_of_timm("test_resnet"), tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "tuneapp.weights.weights_of",
        lambda model: {k: replace(w, crop_mode="squash", cached=file) for k, w in known.items()},
    )
    space = SearchSpace.read(Path(with_weights("DEFAULT", "timm:test_resnet")))
    prepared, _ = prepared_of(space, photos)
    (warning,) = [text for text in prepared.warnings if "crop_mode" in text]
    assert warning.startswith("timm evaluates test_resnet.r160_in1k with crop_mode='squash'")
    assert len(space.branches()) == 2


NOT_PLAIN: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "complex": lambda: torch.tensor([complex(float("nan"), 1)]),
}


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
@pytest.mark.filterwarnings("ignore:.*sparse.*:UserWarning")
def test_fault_25_a_tensor_without_plain_numbers_is_refused_by_name(
    make: Callable[[], torch.Tensor],
    own_state: State,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved({**own_state, "extra": make()}, Path("w.pth"))
    error = refused(capsys, "sweep", with_weights("./w.pth"), "--data", photos)
    assert "w.pth: extra " in error


# --- 26: bombs ------------------------------------------------------------------------------------


def safe(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by its specification: length of the header, header, data."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def one(shape: str, begin: int, end: int) -> bytes:
    return b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}}' % (
        shape.encode(), begin, end,
    )  # fmt: skip


def two(*offsets: tuple[int, int]) -> bytes:
    parts = [
        b'"%s":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}' % (name, *place)
        for name, place in zip((b"a", b"b"), offsets, strict=True)
    ]
    return b"{" + b",".join(parts) + b"}"


def long_header(file: Path) -> None:
    """200 MB of spaces in the header, which a sparse file holds in a few kilobytes."""
    file.write_bytes(safe(b"", length=200_000_000))
    os.truncate(file, 200_000_008)


def deflated(file: Path, numbers: int = 25_000_000) -> None:
    """100 MB of zeros as torch saves them, squeezed to a thousandth, which torch never does."""
    torch.save({"a": torch.zeros(1)}, file)
    with zipfile.ZipFile(file) as plain:
        entries = {entry.filename: plain.read(entry) for entry in plain.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as squeezed:
        for name, content in entries.items():
            with squeezed.open(name, "w") as out:
                for _ in range(4 * numbers // 1_000_000 if name.endswith("data/0") else 0):
                    out.write(bytes(1_000_000))
                if not name.endswith("data/0"):
                    out.write(content)


def shown_again_and_again(file: Path) -> None:
    """Four bytes that speak of 40 TB; a tensor may repeat what is stored."""
    torch.save({"a": torch.full((), float("nan")).expand(10**13)}, file)


BOMBS: dict[str, Callable[[Path], object]] = {
    "long header.safetensors": long_header,
    "header beyond the end.safetensors": lambda f: f.write_bytes(safe(b"{}", length=1 << 62)),
    "overlapping.safetensors": lambda f: f.write_bytes(safe(two((0, 8), (4, 12)), bytes(12))),
    "the same.safetensors": lambda f: f.write_bytes(safe(two((0, 8), (0, 8)), bytes(8))),
    "with a hole.safetensors": lambda f: f.write_bytes(safe(two((0, 8), (12, 20)), bytes(20))),
    "more than there is.safetensors": lambda f: f.write_bytes(
        safe(one("[1000000000000]", 0, 4_000_000_000_000), bytes(8))
    ),
    "more than it declares.safetensors": lambda f: f.write_bytes(safe(one("[2]", 0, 8), bytes(99))),
    "another shape.safetensors": lambda f: f.write_bytes(safe(one("[3]", 0, 8), bytes(8))),
    "overflow.safetensors": lambda f: f.write_bytes(
        safe(one("[4294967296,4294967296]", 0, 8), bytes(8))
    ),
    "backwards.safetensors": lambda f: f.write_bytes(safe(one("[2]", 8, 0), bytes(8))),
    "deflated.pth": deflated,
    "shown again.pth": shown_again_and_again,
}
READ = """
import sys; from pathlib import Path
from tuneapp.errors import WeightsError; from tuneapp.statedict import read_state_dict
def most(): return int(next(x for x in Path('/proc/self/status').open() if 'VmHWM' in x).split()[1])
before = most()
for name in sys.argv[1:]:
    try: read_state_dict(Path(name), 0)
    except WeightsError as error: print(error)
print(most() - before)
"""


def test_fault_26_bombs_are_refused_without_the_memory_that_they_ask_for() -> None:
    for name, make in BOMBS.items():
        make(Path(name))
        assert Path(name).stat().st_blocks * 512 < 1_000_000, name
    files = [str(Path(name).absolute()) for name in BOMBS]
    ran = subprocess.run(
        [sys.executable, "-c", READ, *files],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *told, kilobytes = ran.stdout.splitlines()
    assert len(told) == len(files), told
    for line, file in zip(told, files, strict=True):
        assert file in line
    assert int(kilobytes) < 50_000  # above what torch itself takes


@pytest.mark.parametrize("name", ["long header.safetensors", "deflated.pth"])
def test_fault_26_a_bomb_ends_a_sweep_before_it_begins(
    name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial(deflated, numbers=1_000_000)(Path(name)) if "pth" in name else long_header(Path(name))
    error = refused(capsys, "sweep", with_weights(f"./{name}"), "--data", photos)
    assert f"{name} is not a readable file of plain weights (its " in error


def test_fault_26_the_largest_that_is_honest_is_read(own_state: State, tmp_path: Path) -> None:
    plain = {name: tensor for name, tensor in own_state.items() if tensor.is_floating_point()}
    header = dict.fromkeys((f"note{i}" for i in range(2000)), "x" * 500)  # a megabyte of it
    safetensors.torch.save_file(plain, tmp_path / "w.safetensors", metadata=header)
    for state in (
        read_state_dict(tmp_path / "w.safetensors", 0),
        read_state_dict(saved(plain, tmp_path / "w.pth"), 0),
    ):
        assert all(torch.equal(state[name], plain[name]) for name in plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of storages of before 2022
        torch.save(plain, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert read_state_dict(tmp_path / "old.pth", 0).keys() == plain.keys()


# --- 27: at once ----------------------------------------------------------------------------------

FETCH = """
import sys; from pathlib import Path; from tuneapp.fetch import cached_or_fetched
print('ready', flush=True); sys.stdin.readline()
print(cached_or_fetched(sys.argv[1], 20).read_bytes().hex())
"""


def test_fault_27_processes_that_want_the_same_weights_at_once_fetch_them_once(
    cache: Path,
    server: Server,  # noqa: F811
) -> None:
    server.answers[GOOD_NAME] = partial(send, pause_s=0.5)
    child = subprocess.Popen(
        [sys.executable, "-c", FETCH, server.url(GOOD_NAME)],
        cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(1) as pool:
        here = pool.submit(cached_or_fetched, server.url(GOOD_NAME), 20)
        out, _ = child.communicate("go\n", timeout=20)
        assert here.result(20).read_bytes() == CONTENT
    assert child.returncode == 0
    assert bytes.fromhex(out.strip()) == CONTENT
    assert server.asked == {GOOD_NAME: 1}
    assert left(cache) == [GOOD_NAME]
