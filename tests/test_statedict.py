import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.densenet import DenseNet, _load_state_dict
from torchvision.models.vision_transformer import VisionTransformer

from tests.states import OWN, OwnNet, State, config_of, copied, require_equal, saved
from tuneapp.errors import WeightsError
from tuneapp.models import build_network
from tuneapp.staged import StagedModel
from tuneapp.statedict import read_state_dict
from tuneapp.weights import load_weights


@pytest.fixture(scope="module")
def five_classes() -> State:
    torch.manual_seed(5)
    return dict(build_network("resnet18", 5).state_dict())


@pytest.fixture
def own_state() -> State:
    torch.manual_seed(6)
    return dict(OwnNet(5).state_dict())


# --- Reading a file -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain.pt", "plain.pth", "plain.safetensors", "LOUD.SAFETENSORS"])
def test_a_file_is_read_to_the_same_tensors(name: str, own_state: State, tmp_path: Path) -> None:
    safe = name.lower().endswith(".safetensors")
    (safetensors.torch.save_file if safe else torch.save)(own_state, tmp_path / name)
    state = read_state_dict(tmp_path / name, 0)
    assert state.keys() == own_state.keys()
    assert all(torch.equal(state[n], own_state[n]) for n in state)
    assert all(state[n].dtype == own_state[n].dtype for n in state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "ema": None},
        lambda state: {"model": state, "ema": {"decay": 0.9}},
        lambda state: {"model": {"x": torch.zeros(1)}, "ema": state},
        lambda state: {"model": {"x": torch.zeros(1)}, "state_dict": state},
        lambda state: {"state_dict": state | {"note": "mine"}},
        lambda state: {"net": state, "epoch": 3},
        lambda state: {"student": {"x": torch.zeros(1)}, "teacher": state},
        lambda state: {"weights": state},
        lambda state: {"model": {"state_dict": state, "name": "mine"}},
        lambda state: {"ema": {"model": {"note": 1}}, "model": {"net": {"weights": state}}},
        # As the training scripts of torchvision and timm save it.
        lambda state: {"model": state, "args": Namespace(lr=0.1, sizes=[1, 2], aa=None)},
        lambda state: {
            "arch": "x",
            "state_dict": state,
            "args": Namespace(opt="sgd"),
            "metric": 7.0,
        },
    ],
    ids=[
        *("state_dict", "model", "no ema", "settings of ema", "ema", "two", "a word", "net"),
        *("teacher", "weights", "twice", "three times", "torchvision's", "timm's"),
    ],
)
def test_a_state_dict_is_found_in_its_usual_wrappings(
    wrap: Callable[[State], object], own_state: State, tmp_path: Path
) -> None:
    state = read_state_dict(saved(wrap(own_state), tmp_path / "wrapped.pt"), 0)
    assert state.keys() == own_state.keys()
    assert all(torch.equal(state[name], own_state[name]) for name in state)


def cut_in_half(file: Path) -> None:
    saved({"conv1.weight": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lie_about_the_header(file: Path) -> None:
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize("name", ["spoilt.pt", "spoilt.safetensors"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(bytes(range(256)) * 20),
        lambda file: file.write_text("<!DOCTYPE html><html>Please log in</html>"),
        lambda file: file.write_bytes(b""),
        cut_in_half,
        lie_about_the_header,
        lambda file: saved({}, file),
    ],
    ids=["garbage", "html", "empty", "truncated", "header", "nothing"],
)
def test_a_damaged_file_is_refused_by_name(
    spoil: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    spoil(file)
    with pytest.raises(WeightsError, match=re.escape(name)) as caught:
        load_weights(OwnNet(3), config_of(OWN), file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("w.safetensors", (1).to_bytes(8, "little"), "its header claims 9 bytes, but at most 8 "),
        ("text.pth", b"hello world\n", "KeyError: 101)"),
        ("empty.pth", b"", "EOFError)"),
    ],
)
def test_the_cause_of_an_unreadable_file_is_told_in_words(
    name: str, content: bytes, cause: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_state_dict(tmp_path / name, 0)
    told = f"{tmp_path / name} is not a readable file of plain weights ({cause}"
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_file_is_refused_without_torch_s_own_warning(
    protocol: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"model": Touch(tmp_path / "marker")}, protocol=protocol))
    with pytest.raises(WeightsError, match=r"model\.pkl (holds a pickled|is not a readable)"):
        read_state_dict(file, 0)
    assert not recwarn.list
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, [torch.zeros(2)], {"model": {"epoch": 3}}, torch.zeros(2)]
)
def test_a_file_without_a_state_dict_is_refused_by_name(content: object, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"other\.pt holds no state_dict"):
        read_state_dict(saved(content, tmp_path / "other.pt"), 0)


def test_a_file_without_a_state_dict_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    file = saved({"epoch": 3, "backbone": {"x": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"; at its top level: epoch, backbone$"):
        read_state_dict(file, 0)
    with pytest.raises(WeightsError, match=r"; it holds a list$"):
        read_state_dict(saved([torch.zeros(2)], file), 1)
    many = {f"k{i}": i for i in range(11)}
    with pytest.raises(WeightsError, match=r"; at its top level: k0, .*, k9, \.\.\.$"):
        read_state_dict(saved(many, file), 2)


def test_a_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    around: dict[str, object] = {}
    around.update(dict.fromkeys(("ema", "teacher", "state_dict", "model", "net"), around))
    with pytest.raises(WeightsError, match=r"other\.pt holds no state_dict"):
        read_state_dict(saved(around, tmp_path / "other.pt"), 0)


@pytest.mark.parametrize("new", [True, False], ids=["archive", "as before 2020"])
def test_a_class_that_is_refused_is_named_and_not_called_damaged(new: bool, tmp_path: Path) -> None:
    content = {"model": {"x": torch.zeros(2)}, "where": Touch(tmp_path), "args": Namespace(lr=1)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(
        WeightsError, match=r"w\.pt holds a pickled object \((_?io)\.open\)"
    ) as told:
        read_state_dict(tmp_path / "w.pt", 0)
    assert "damaged" not in str(told.value)
    assert "Namespace" not in str(told.value)


def test_of_a_whole_network_that_was_saved_the_first_classes_are_named(tmp_path: Path) -> None:
    whole = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.GELU())
    with pytest.raises(WeightsError) as told:
        read_state_dict(saved(whole, tmp_path / "w.pt"), 0)
    assert str(told.value) == (
        f"{tmp_path / 'w.pt'} holds a pickled object (torch.nn.modules.activation.GELU, "
        "torch.nn.modules.activation.ReLU, torch.nn.modules.batchnorm.BatchNorm1d, ...), which "
        "could run code; it must hold plain tensors: save it with torch.save(model.state_dict(), "
        "...)"
    )


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


def test_a_flipped_bit_in_a_tensor_is_found_and_its_record_named(tmp_path: Path) -> None:
    file = saved({"a": torch.ones(5000), "b": torch.ones(5000)}, tmp_path / "w.pt")
    with zipfile.ZipFile(file) as archive:
        begin = archive.getinfo("w/data/1").header_offset
    flip(file, begin + 10_000)
    # torch reads other numbers without a word.
    assert not torch.load(file, weights_only=True)["b"].eq(1).all()
    with pytest.raises(WeightsError, match=r"w\.pt is damaged: the checksum of w/data/1 in it"):
        read_state_dict(file, 0)


def test_an_archive_that_was_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = saved({"a": torch.ones(50)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state_dict(file, 0)["a"].sum() == 50


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n",
            "is a Git LFS pointer: run `git lfs pull`",
        ),
        (b"\n <!DOCTYPE html><html>Please log in</html>", "is a web page, not weights"),
        (b"<HTML><body>404</body></HTML>", "is a web page, not weights"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_what_was_downloaded_in_place_of_weights_is_told(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(f"{name} {told}")):
        read_state_dict(tmp_path / name, 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_told(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt is TorchScript; save its state_dict\(\)"):
        read_state_dict(tmp_path / "w.pt", 0)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("w.safetensors", "w.pt"), ("w.pt", "w.safetensors"), ("w.pt", "w.bin"), ("w.pt", "w")],
)
@pytest.mark.parametrize("new", [True, False], ids=["archive", "as before 2020"])
def test_a_file_is_read_by_its_content_whatever_its_ending_is(
    right: str, wrong: str, new: bool, own_state: State, tmp_path: Path
) -> None:
    if right == "w.pt":
        torch.save(own_state, tmp_path / right, _use_new_zipfile_serialization=new)
    else:
        saved(own_state, tmp_path / right)
    (tmp_path / right).rename(tmp_path / wrong)
    state = read_state_dict(tmp_path / wrong, 0)
    assert all(torch.equal(state[name], tensor) for name, tensor in own_state.items())


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64]
)
def test_whole_and_complex_numbers_do_not_become_weights(
    dtype: torch.dtype, own_state: State, tmp_path: Path
) -> None:
    network = OwnNet(5)
    before = copied(network)
    file = saved(
        {**own_state, "body.0.weight": own_state["body.0.weight"].to(dtype)}, tmp_path / "w"
    )
    with pytest.raises(WeightsError, match=r"1 of another kind of numbers \(body\.0\.weight\)"):
        load_weights(network, config_of(OWN), file)
    require_equal(network, before)
    report = load_weights(network, config_of(OWN, partial_weights=True), file)
    assert (report.other_kind, report.other_shape) == (("body.0.weight",), ())
    require_equal(network, {**own_state, "body.0.weight": before["body.0.weight"]})
    # A head of another kind is a new head.
    file = saved({**own_state, "head.2.bias": own_state["head.2.bias"].to(dtype)}, tmp_path / "h")
    assert load_weights(OwnNet(5), config_of(OWN), file).other_kind == ("head.2.bias",)


@pytest.mark.parametrize("name", ["gone.pt", "gone.safetensors"])
def test_a_file_that_is_gone_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"{name} cannot be read: No such file"):
        load_weights(OwnNet(3), config_of(OWN), tmp_path / name)


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


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_with_the_name_of_their_tensor(
    value: float, name: str, tmp_path: Path
) -> None:
    spoilt = torch.zeros(3, 4)
    spoilt[1, 2] = value
    file = saved({"conv1.weight": torch.ones(2), "bn1.bias": spoilt}, tmp_path / name)
    with pytest.raises(WeightsError, match=rf"{name}: bn1\.bias holds NaN or infinite"):
        read_state_dict(file, 0)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_was_changed_is_read_anew(name: str, tmp_path: Path) -> None:
    for changed_ns, value in ((1, 3.0), (2, 4.0)):
        file = saved({"x": torch.tensor(value)}, tmp_path / name)
        assert float(read_state_dict(file, changed_ns)["x"]) == value


def test_what_was_read_does_not_follow_the_file(tmp_path: Path) -> None:
    file = saved({"x": torch.ones(1000)}, tmp_path / "w.safetensors")
    state = read_state_dict(file, 0)
    with file.open("r+b") as content:
        content.write(bytes(file.stat().st_size))
    assert torch.equal(state["x"], torch.ones(1000))


# --- Prefixes -------------------------------------------------------------------------------------


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "network.", "model.", "anything.", "module.network."),
        *("module._orig_mod.", "a.b.c.", "module.module.", "stem.", "fc.", "0."),
    ],
)
def test_a_prefix_is_taken_off_by_what_fits_without_it(
    prefix: str, five_classes: State, tmp_path: Path
) -> None:
    network = build_network("resnet18", 5)
    file = saved(under(prefix, five_classes), tmp_path / "wrapped.pt")
    report = load_weights(network, config_of(), file)
    require_equal(network, five_classes)
    assert str(report) == "122 tensors loaded"


def averaged(network: nn.Module) -> nn.Module:
    average = AveragedModel(network)
    average.update_parameters(network)
    return average


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        averaged,
        lambda network: nn.DataParallel(torch.compile(network)),
        lambda network: averaged(nn.DataParallel(network)),
        lambda network: StagedModel(network),
    ],
    ids=["DataParallel", "compile", "average", "both", "average of both", "staged"],
)
def test_what_torch_wraps_a_network_in_is_taken_off(
    wrap: Callable[[nn.Module], nn.Module], own_state: State, tmp_path: Path
) -> None:
    donor, network = OwnNet(5), OwnNet(5)
    donor.load_state_dict(own_state)
    state = wrap(donor).state_dict()
    assert not state.keys() & own_state.keys()
    report = load_weights(network, config_of(OWN), saved(state, tmp_path / "wrapped.pt"))
    require_equal(network, own_state)
    assert (report.missing, report.unexpected, report.other_shape) == ((), (), ())


def test_a_prefix_is_taken_off_a_head_of_another_size_too(
    five_classes: State, tmp_path: Path
) -> None:
    network = build_network("resnet18", 3)
    file = saved(under("module.", five_classes), tmp_path / "wrapped.pt")
    report = load_weights(network, config_of(), file)
    assert report.other_shape == ("fc.weight", "fc.bias")
    assert report.unexpected == ()


def test_a_backbone_within_a_larger_network_is_found(five_classes: State, tmp_path: Path) -> None:
    network = build_network("resnet18", 5)
    whole = under("model.backbone.", five_classes)
    whole |= {"model.neck.weight": torch.ones(9), "loss.weight": torch.ones(5)}
    report = load_weights(network, config_of(), saved(whole, tmp_path / "whole.pt"))
    require_equal(network, five_classes)
    assert set(report.unexpected) == {"model.neck.weight", "loss.weight"}


def test_prefixes_of_which_one_stays_in_the_other_are_both_taken_off(
    own_state: State, tmp_path: Path
) -> None:
    wrapped = {
        ("module." if name.startswith("head.") else "module.net.") + name: tensor
        for name, tensor in own_state.items()
    }
    network = OwnNet(5)
    report = load_weights(network, config_of(OWN), saved(wrapped, tmp_path / "wrapped.pt"))
    require_equal(network, own_state)
    assert report.unexpected == ()


def test_what_fits_as_it_is_gives_way_to_nothing_in_a_wrapping(
    own_state: State, tmp_path: Path
) -> None:
    head = {name: t for name, t in own_state.items() if name.startswith("head.")}
    rest = {name: t for name, t in own_state.items() if name not in head}
    wrapped = under("module.", {**rest, "head.2.weight": torch.ones(9, 6)})
    network = OwnNet(5)
    # Whichever comes first in the file.
    for state in (head | wrapped, wrapped | head):
        report = load_weights(network, config_of(OWN), saved(state, tmp_path / f"{id(state)}.pt"))
        require_equal(network, own_state)
        assert (report.other_shape, report.unexpected) == ((), ("module.head.2.weight",))


def test_names_are_in_the_order_of_the_file(own_state: State, tmp_path: Path) -> None:
    file = saved(under("module.", own_state), tmp_path / "wrapped.pt")
    report = load_weights(OwnNet(5), config_of(OWN), file)
    assert report.loaded == tuple(own_state)


def test_of_two_networks_in_one_file_none_is_guessed(five_classes: State, tmp_path: Path) -> None:
    two = under("query.", five_classes) | under("key.", five_classes)
    file = saved(two, tmp_path / "two.pt")
    with pytest.raises(WeightsError, match=r"0% .*244 not of this network \(query\.conv1\.weight"):
        load_weights(build_network("resnet18", 5), config_of(), file)


# --- Names of old files ---------------------------------------------------------------------------


def densenet() -> DenseNet:
    return DenseNet(growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8, num_classes=3)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_densenet_is_found_under_the_names_that_torchvision_s_files_have(
    prefix: str, tmp_path: Path
) -> None:
    old = {
        re.sub(r"(denselayer\d)\.(norm|conv)(\d)", r"\1.\2.\3", name): tensor
        for name, tensor in copied(densenet()).items()
        if not name.endswith("num_batches_tracked")  # which those files lack
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    # torchvision's own way to load them, which wants an entry of its list.
    wanted = densenet()
    _load_state_dict(wanted, SimpleNamespace(get_state_dict=lambda **_: dict(old)), False)
    network = densenet()
    file = saved(under(prefix, old), tmp_path / "w.pt")
    assert load_weights(network, config_of("densenet121"), file).unexpected == ()
    require_equal(network, wanted.state_dict())


def test_a_file_of_a_network_s_own_that_only_sounds_old_keeps_its_names(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"linear_1": nn.Linear(8, 8), "0": nn.Linear(8, 8)})

    network, donor = OwnNet(3), OwnNet(3)
    network.body.append(Block())
    donor.body.append(Block())
    wanted = copied(donor)
    load_weights(network, config_of(OWN), saved(wanted, tmp_path / "w.pt"))
    require_equal(network, wanted)


# --- Vision transformers at another image size ----------------------------------------------------


def vit(image_size: int, patch_size: int = 8, classes: int = 3) -> VisionTransformer:
    net = VisionTransformer(
        image_size,
        patch_size,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        num_classes=classes,
    )
    nn.init.normal_(net.heads.head.weight)
    return net


POSITIONS = "encoder.pos_embedding"


def grid(positions: Tensor) -> Tensor:
    """Position embeddings without that of the class token, (rows, columns, hidden)."""
    side = round((positions.shape[1] - 1) ** 0.5)
    return positions[0, 1:].reshape(side, side, -1)


@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 16), (32, 64), (24, 40)])
def test_position_embeddings_are_interpolated_for_another_image_size(
    theirs: int, ours: int, tmp_path: Path
) -> None:
    state, network = copied(vit(theirs)), vit(ours, classes=5)
    # What interpolation must give back: a ramp over the rows, 0 to 1.
    ramp = torch.linspace(0, 1, theirs // 8)[:, None].expand(theirs // 8, theirs // 8).flatten()
    state[POSITIONS][0, 1:, 0] = ramp
    report = load_weights(network, config_of("vit_b_16"), saved(state, tmp_path / "vit.pt"))
    assert report.interpolated == (POSITIONS,)
    assert set(report.other_shape) == {"heads.head.weight", "heads.head.bias"}
    assert "1 interpolated for another image size (encoder.pos_embedding)" in str(report)
    got, given = network.state_dict()[POSITIONS], state[POSITIONS]
    assert got.shape == (1, 1 + (ours // 8) ** 2, 8)
    assert torch.equal(got[0, 0], given[0, 0])  # the class token has no place
    for row in (0, -1):
        for column in (0, -1):  # corners lie upon corners
            torch.testing.assert_close(grid(got)[row, column], grid(given)[row, column])
    columns = grid(got)[:, :, 0]
    torch.testing.assert_close(columns, columns[:, :1].expand_as(columns))
    assert (columns[:, 0].diff() > 0).all()
    rest = [name for name in report.loaded if name != POSITIONS]
    require_equal(network, state, *rest)
    network.eval()(torch.zeros(1, 3, ours, ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_position_embeddings_of_every_precision_are_interpolated(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in copied(vit(16)).items()}
    as_float = {name: tensor.float() for name, tensor in state.items()}
    network, wanted = vit(32), vit(32)
    load_weights(network, config_of("vit_b_16"), saved(state, tmp_path / "vit.safetensors"))
    load_weights(wanted, config_of("vit_b_16"), saved(as_float, tmp_path / "float.pt"))
    require_equal(network, wanted.state_dict())
    assert network.state_dict()[POSITIONS].dtype == torch.float32


def test_position_embeddings_of_the_same_number_are_kept(tmp_path: Path) -> None:
    state, network = copied(vit(32)), vit(32)
    report = load_weights(network, config_of("vit_b_16"), saved(state, tmp_path / "vit.pt"))
    require_equal(network, state)
    assert report.interpolated == ()


def test_patches_of_another_size_are_another_network(tmp_path: Path) -> None:
    # The same grid of 4 x 4 patches, so that the positions fit.
    file = saved(copied(vit(64, patch_size=16)), tmp_path / "vit.pt")
    with pytest.raises(WeightsError, match=r"1 of another shape \(conv_proj\.weight\)"):
        load_weights(vit(32, patch_size=8), config_of("vit_b_32"), file)


def test_position_embeddings_that_are_no_square_are_said(tmp_path: Path) -> None:
    state = {**copied(vit(32)), POSITIONS: torch.zeros(1, 8, 8)}
    file = saved(state, tmp_path / "vit.pt")
    with pytest.raises(WeightsError, match=r"1 of another shape \(encoder\.pos_embedding\)"):
        load_weights(vit(32), config_of("vit_b_16"), file)


@pytest.mark.parametrize("size", [32, 64])
def test_a_vit_is_found_under_the_names_that_torchvision_s_files_have(
    size: int, tmp_path: Path
) -> None:
    state = copied(vit(32))
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in state.items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in old
    oracle = vit(32)
    oracle.load_state_dict(dict(old))  # torchvision's blocks know them, where a version is lacking
    require_equal(oracle, state)
    network = vit(size)
    report = load_weights(network, config_of("vit_b_16"), saved(old, tmp_path / "vit.pt"))
    assert (report.missing, report.unexpected) == ((), ())
    require_equal(network, state, *(name for name in state if name != POSITIONS))
