import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import Weights, WeightsEnum
from torchvision.transforms._presets import ImageClassification

from tests.states import (
    LADDER,
    ONE_STAGE,
    OWN,
    OneStage,
    OwnNet,
    State,
    config_of,
    copied,
    empty_state,
    ladder,
    require_equal,
    saved,
)
from tuneapp.average import WeightAverage
from tuneapp.checkpoint import MANIFEST, TrainState, drop
from tuneapp.config import Preprocess, TrialConfig
from tuneapp.config.trial import INTERPOLATIONS
from tuneapp.data.examples import ImageSet
from tuneapp.data.pixels import Preprocessing
from tuneapp.errors import ConfigError, WeightsError
from tuneapp.families import FAMILIES
from tuneapp.fit import skeleton
from tuneapp.models import build_network, build_staged
from tuneapp.optim import build_optimizer
from tuneapp.schedules import Schedule
from tuneapp.weights import find_weights, load_weights, preprocessing_of, require_same_weights

CONTENT = b"forty-two megabytes of weights, more or less"
HASH = hashlib.sha256(CONTENT).hexdigest()[:8]
GOOD_NAME = f"tiny-{HASH}.pth"


@pytest.fixture(scope="module")
def five_classes() -> State:
    torch.manual_seed(5)
    return dict(build_network("resnet18", 5).state_dict())


@pytest.fixture
def own_state() -> State:
    torch.manual_seed(6)
    return dict(OwnNet(5).state_dict())


# --- What fits ------------------------------------------------------------------------------------


def test_a_head_of_another_size_is_replaced_and_said(five_classes: State, tmp_path: Path) -> None:
    network = build_network("resnet18", 3)
    fresh = copied(network)
    report = load_weights(network, config_of(), saved(five_classes, tmp_path / "five.pt"))
    for name, tensor in network.state_dict().items():
        wanted = fresh if name.startswith("fc.") else five_classes
        assert torch.equal(tensor, wanted[name]), name
    assert report.other_shape == ("fc.weight", "fc.bias")
    assert set(report.loaded) == set(five_classes) - {"fc.weight", "fc.bias"}
    assert (report.missing, report.unexpected, report.interpolated) == ((), (), ())
    assert str(report) == "120 tensors loaded; 2 of another shape (fc.weight, fc.bias)"


def test_a_head_of_the_same_size_is_kept(five_classes: State, tmp_path: Path) -> None:
    network = build_network("resnet18", 5)
    load_weights(network, config_of(), saved(five_classes, tmp_path / "five.safetensors"))
    require_equal(network, five_classes)


SMALLEST = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
    *("resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_v2_t"),
    *("vgg11", "vit_b_32", "wide_resnet50_2"),
)


@pytest.mark.filterwarnings("ignore:for .*meta parameter:UserWarning")
@pytest.mark.parametrize("model", SMALLEST)
def test_of_every_family_all_but_the_last_layer_is_loaded(model: str, tmp_path: Path) -> None:
    state = empty_state(model, 5)
    network = skeleton(model).network
    own = network.state_dict()
    of_classes = {name for name in own if own[name].shape != state[name].shape}
    assert 1 <= len(of_classes) <= 2  # a weight and, but for MaxViT, a bias
    report = load_weights(network, config_of(model), saved(state, tmp_path / "five.pt"))
    assert set(report.other_shape) == of_classes
    assert set(report.loaded) == own.keys() - of_classes
    assert (report.missing, report.unexpected) == ((), ())


def test_those_are_all_families() -> None:
    # A family is a stages function, whatever its options are.
    covered = {FAMILIES[model].stages for model in SMALLEST}
    assert covered == {family.stages for family in FAMILIES.values()}


@pytest.mark.filterwarnings("ignore:for .*meta parameter:UserWarning")
@pytest.mark.parametrize("model", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_heads(model: str, tmp_path: Path) -> None:
    heads = tuple(FAMILIES[model].aux)
    # torchvision's files have them: half of GoogLeNet's numbers.
    file = saved(empty_state(model, aux=True), tmp_path / "with.pt")
    report = load_weights(skeleton(model).network, config_of(model), file)
    assert report.unexpected
    assert all(name.startswith(heads) for name in report.unexpected)
    assert (report.missing, report.other_shape) == ((), ())

    both = config_of(model, aux_weight=0.3)
    file = saved(empty_state(model, 5, aux=True), tmp_path / "five.pt")
    report = load_weights(skeleton(model, None, True).network, both, file)
    last = {name.rpartition(".")[0] for name in report.other_shape}
    wanted = {"googlenet": {"aux1.fc2", "aux2.fc2"}, "inception_v3": {"AuxLogits.fc"}}[model]
    assert last == {"fc"} | wanted
    assert any(name.startswith(heads) for name in report.loaded)

    file = saved(empty_state(model), tmp_path / "without.pt")
    report = load_weights(skeleton(model, None, True).network, both, file)
    assert report.missing
    assert all(name.startswith(heads) for name in report.missing)


def test_missing_and_foreign_tensors_are_said(five_classes: State, tmp_path: Path) -> None:
    state = {k: v for k, v in five_classes.items() if k not in ("bn1.weight", "fc.bias")}
    state["aux.weight"] = torch.zeros(2)
    file = saved(state, tmp_path / "some.pt")
    report = load_weights(build_network("resnet18", 5), config_of(), file)
    assert report.missing == ("bn1.weight", "fc.bias")
    assert report.unexpected == ("aux.weight",)
    assert str(report) == (
        "120 tensors loaded; 2 missing in the file (bn1.weight, fc.bias); "
        "1 not of this network (aux.weight)"
    )


def test_a_backbone_with_gaps_is_warned_of(
    five_classes: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {k: v for k, v in five_classes.items() if not k.startswith("layer2.")}
    with caplog.at_level(logging.WARNING):
        load_weights(build_network("resnet18", 5), config_of(), saved(state, tmp_path / "gaps.pt"))
    (warning,) = caplog.messages
    assert re.search(r"gaps\.pt fits \d\d % of resnet18's backbone: 92 tensors loaded", warning)


def test_old_files_without_counts_of_batches_lack_nothing(
    five_classes: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {k: v for k, v in five_classes.items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 102
    network = build_network("resnet18", 5)
    with caplog.at_level(logging.WARNING):
        report = load_weights(network, config_of(), saved(state, tmp_path / "old.pt"))
    require_equal(network, state, *state)
    assert str(report) == "102 tensors loaded"
    assert caplog.messages == []


def test_a_date_in_the_name_of_a_user_s_file_is_no_hash(
    five_classes: State, tmp_path: Path
) -> None:
    file = saved(five_classes, tmp_path / "best-20240131.pt")
    assert len(load_weights(build_network("resnet18", 3), config_of(), file).loaded) == 120


def test_mnasnet_is_told_the_version_that_it_asks_for(tmp_path: Path) -> None:
    wanted = copied(build_network("mnasnet0_5", 3))
    network = build_network("mnasnet0_5", 3)
    load_weights(network, config_of("mnasnet0_5"), saved(wanted, tmp_path / "w.pt"))
    require_equal(network, wanted)


# --- Of another network ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mobilenet_v3_small", "wide_resnet50_2", "vgg11", "vit_b_16"])
def test_a_file_of_another_network_is_refused_by_name(model: str, tmp_path: Path) -> None:
    file = saved(empty_state(model), tmp_path / "other.pt")
    network = build_network("resnet18", 5)
    before = copied(network)
    with pytest.raises(
        WeightsError, match=r"other\.pt fits \d+% of resnet18's backbone: .*another network"
    ) as caught:
        load_weights(network, config_of(), file)
    require_equal(network, before)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # Most of their tensors have the same names and shapes.
        ("resnet50", "resnet18"),
        ("resnext50_32x4d", "wide_resnet50_2"),
        ("resnet34", "resnet50"),
        # Theirs hold all that ours need, and more.
        ("resnet34", "resnet18"),
        ("resnet152", "resnet101"),
        ("efficientnet_b1", "efficientnet_b0"),
        ("convnext_small", "convnext_tiny"),
        ("swin_s", "swin_t"),
        # The dense layers, nine tenths of the numbers, are the same.
        ("vgg11", "vgg13"),
        ("vgg19", "vgg13"),
        ("vgg13", "vgg11"),
    ],
)
def test_a_relative_of_the_network_is_another_network(
    theirs: str, ours: str, tmp_path: Path
) -> None:
    file = saved(empty_state(theirs), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"it belongs to another network .*partial_weights=True"):
        load_weights(skeleton(ours).network, config_of(ours), file)


def test_a_larger_relative_is_refused_with_the_share_of_it_that_is_ours(tmp_path: Path) -> None:
    file = saved(empty_state("resnet34"), tmp_path / "r34.pth")
    # resnet18 has 11 689 512 parameters and resnet34 21 797 672, of which the head are 513 000;
    # their BatchNorms have 4 800 and 8 512 channels, with a mean and a variance each.
    wanted = (11_689_512 - 513_000 + 2 * 4_800) / (21_797_672 - 513_000 + 2 * 8_512)
    said = rf"fits 100% of resnet18's backbone, which is {wanted:.0%} of the file: "
    with pytest.raises(WeightsError, match=said):
        load_weights(build_network("resnet18", 3), config_of(), file)


@pytest.mark.parametrize(("steps", "others", "taken"), [
    (5, 0, True), (4, 0, False), (10, 3, True), (10, 4, False), (9, 3, True), (9, 4, False),
])  # fmt: skip
def test_half_of_the_network_and_three_quarters_of_the_file_must_be_the_same(
    steps: int, others: int, taken: bool, tmp_path: Path
) -> None:
    state = {f"step{i}.weight": torch.ones(4, 4) for i in range(steps)}
    state |= {f"other{i}.weight": torch.ones(4, 4) for i in range(others)}
    # Heads and counts of batches are neither here nor there.
    state |= {f"head.{i}.weight": torch.ones(100, 100) for i in range(50)}
    state |= {f"bn{i}.num_batches_tracked": torch.tensor(1) for i in range(50)}
    file = saved(state, tmp_path / "ladder.pt")
    if taken:
        assert len(load_weights(ladder(2), config_of(LADDER), file).loaded) == steps
    else:
        with pytest.raises(WeightsError, match=f"fits {steps}0% "):
            load_weights(ladder(2), config_of(LADDER), file)


def test_partial_weights_take_what_fits_of_a_relative(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = copied(build_network("resnet34", 3))
    network = build_network("resnet18", 3)
    file = saved(theirs, tmp_path / "r34.pth")
    report = load_weights(network, config_of(partial_weights=True), file)
    require_equal(network, theirs)
    assert len(report.loaded) == 122
    assert set(report.unexpected) == theirs.keys() - network.state_dict().keys()


def test_partial_weights_take_a_single_stage(five_classes: State, tmp_path: Path) -> None:
    state = {k: v for k, v in five_classes.items() if k.startswith(("conv1.", "bn1.", "layer1."))}
    file = saved(state, tmp_path / "stage.pt")
    network = build_network("resnet18", 5)
    before = copied(network)
    with pytest.raises(WeightsError, match="partial_weights=True"):
        load_weights(network, config_of(), file)
    require_equal(network, before)
    report = load_weights(network, config_of(partial_weights=True), file)
    assert set(report.loaded) == set(state)
    require_equal(network, before | state)


def test_a_backbone_tensor_of_another_shape_is_refused_unless_part_is_enough(
    five_classes: State, tmp_path: Path
) -> None:
    grey = {**five_classes, "conv1.weight": torch.ones(64, 1, 7, 7)}
    file = saved(grey, tmp_path / "grey.pt")
    network = build_network("resnet18", 5)
    before = copied(network)
    with pytest.raises(WeightsError, match=r"1 of another shape \(conv1\.weight\)"):
        load_weights(network, config_of(), file)
    report = load_weights(network, config_of(partial_weights=True), file)
    assert report.other_shape == ("conv1.weight",)
    require_equal(network, {**five_classes, "conv1.weight": before["conv1.weight"]})


@pytest.mark.parametrize("partial_weights", [False, True])
def test_a_file_of_which_nothing_fits_is_no_part_either(
    partial_weights: bool, tmp_path: Path
) -> None:
    file = saved(empty_state("vgg11"), tmp_path / "vgg.pt")
    config = config_of(partial_weights=partial_weights)
    with pytest.raises(WeightsError, match=r"vgg\.pt fits 0% of resnet18's") as caught:
        load_weights(build_network("resnet18", 5), config, file)
    assert "partial_weights" not in str(caught.value)  # it would not help
    assert str(caught.value).endswith("; give weights of resnet18, or None for random ones")


# --- A network of one's own -----------------------------------------------------------------------


def test_the_last_stage_of_one_s_own_network_may_be_of_another_size(
    own_state: State, tmp_path: Path
) -> None:
    network = OwnNet(3)
    report = load_weights(network, config_of(OWN), saved(own_state, tmp_path / "five.pt"))
    assert report.other_shape == ("head.2.weight", "head.2.bias")
    assert set(report.loaded) == own_state.keys() - set(report.other_shape)
    require_equal(network, own_state, *report.loaded)


def test_all_of_the_last_stage_may_be_of_another_kind(own_state: State, tmp_path: Path) -> None:
    state = {n: t for n, t in own_state.items() if not n.startswith("head.")}
    # More numbers and tensors than all the rest have.
    state |= {f"head.{i}.weight": torch.ones(50, 50) for i in range(3, 30)}
    report = load_weights(OwnNet(3), config_of(OWN), saved(state, tmp_path / "other_head.pt"))
    assert len(report.unexpected) == 27


def test_another_stage_of_one_s_own_network_must_fit(own_state: State, tmp_path: Path) -> None:
    state = {**own_state, "body.0.weight": torch.ones(8, 4, 5, 5)}
    file = saved(state, tmp_path / "wide.pt")
    with pytest.raises(
        WeightsError, match=rf"wide\.pt fits \d+% of {re.escape(OWN)}'s .*1 of another shape"
    ):
        load_weights(OwnNet(5), config_of(OWN), file)


@pytest.mark.parametrize("classes", [3, 5])
def test_of_a_network_of_one_stage_all_may_be_of_another_size(classes: int, tmp_path: Path) -> None:
    state, network = copied(OneStage(5)), OneStage(classes)
    report = load_weights(network, config_of(ONE_STAGE), saved(state, tmp_path / "w.pt"))
    assert len(report.loaded) == (4 if classes == 5 else 2)
    require_equal(network, state, *report.loaded)


def test_a_file_of_which_nothing_fits_one_stage_is_refused(tmp_path: Path) -> None:
    file = saved({"x.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt fits 0% of"):
        load_weights(OneStage(5), config_of(ONE_STAGE, partial_weights=True), file)


# --- Checkpoints of a trial -----------------------------------------------------------------------


def trained(folder: Path, **values: Any) -> tuple[list[State], list[State]]:
    """Save three epochs, of which the second is the best; return weights and averages of each."""
    config = config_of(OWN, weights=None, epochs=3, **values)
    torch.manual_seed(7)
    model = build_staged(config, 5)
    optimizer = build_optimizer(model, config)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        schedule=Schedule(optimizer, config, 1),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        config=config,
        steps_per_epoch=1,
        average=None if config.ema_decay is None else WeightAverage(model, config.ema_decay),
    )
    weights, averages = [], []
    for epoch in (1, 2, 3):
        model.train()(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        if state.average is not None:
            state.average.update(model)
            averages.append(copied(state.average.model.network))
        weights.append(copied(model.network))
        state.history.append({"epoch": epoch})
        state.best_epoch = min(epoch, 2)
        state.save(folder / "checkpoints")
    return weights, averages


@pytest.mark.parametrize("asked", ["t0001", "t0001/checkpoints"])
def test_a_trial_s_folder_stands_for_its_best_checkpoint(asked: str, tmp_path: Path) -> None:
    weights, _ = trained(tmp_path / "t0001")
    found = find_weights(OWN, str(tmp_path / asked))
    file = tmp_path / "t0001/checkpoints/epoch-0002.pt"
    assert (found.file, found.name, found.warning) == (str(file.resolve()), "checkpoint", "")
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    network = OwnNet(5)
    report = load_weights(network, config_of(OWN), file)
    require_equal(network, weights[1])
    assert str(report) == f"{len(weights[1])} tensors loaded"
    require_same_weights(found.as_dict())


def test_a_folder_without_a_slash_is_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "t0001")
    monkeypatch.chdir(tmp_path)
    wanted = str((tmp_path / "t0001/checkpoints/epoch-0002.pt").resolve())
    assert find_weights(OWN, "t0001").file == wanted
    assert find_weights("resnet18", "t0001").file == wanted


def test_of_a_checkpoint_with_an_average_the_average_is_taken(tmp_path: Path) -> None:
    weights, averages = trained(tmp_path, ema_decay=0.9)
    found = find_weights(OWN, str(tmp_path))
    network = OwnNet(5)
    report = load_weights(network, config_of(OWN), Path(str(found.file)))
    require_equal(network, averages[1])
    assert not torch.equal(averages[1]["head.1.weight"], weights[1]["head.1.weight"])
    assert str(report) == f"{len(averages[1])} tensors loaded"


def forget(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def scribble(folder: Path) -> None:
    (folder / MANIFEST).write_text("not JSON")


def lose_the_best(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["best"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def remove_the_file(folder: Path) -> None:
    (folder / "epoch-0002.pt").unlink()


def lead_elsewhere(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "epoch-0002.pt").rename(folder.parent / "epoch-0002.pt")
    manifest["best"]["file"] = "../epoch-0002.pt"
    (folder / MANIFEST).write_text(json.dumps(manifest))


def keep_nothing(folder: Path) -> None:
    drop(folder)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (forget, "no checkpoint of a trial in this folder; give a file, or a folder such as "),
        (scribble, "{folder} holds no intact best checkpoint"),
        (lose_the_best, "{folder} holds no intact best checkpoint"),
        (lead_elsewhere, "{folder} holds no intact best checkpoint"),
        (
            remove_the_file,
            "{folder} holds no intact best checkpoint: {folder}/epoch-0002.pt cannot",
        ),
        (keep_nothing, "{folder}: the checkpoints of this trial were not kept; raise --keep-best"),
    ],
)
def test_a_folder_without_a_best_checkpoint_is_refused_by_name(
    spoil: Callable[[Path], None], cause: str, tmp_path: Path
) -> None:
    trained(tmp_path)
    folder = tmp_path / "checkpoints"
    spoil(folder)
    told = f"weights {str(tmp_path)!r}: {cause.format(folder=folder)}"
    with pytest.raises(WeightsError, match=re.escape(told)) as caught:
        find_weights(OWN, str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "Error" not in str(caught.value)  # of Python's


def test_a_damaged_checkpoint_is_refused_by_its_manifest(tmp_path: Path) -> None:
    trained(tmp_path)
    file = tmp_path / "checkpoints/epoch-0002.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=rf"epoch-0002\.pt is damaged: .*{MANIFEST}"):
        find_weights(OWN, str(tmp_path))


# --- Finding --------------------------------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "torch"
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home / "hub" / "checkpoints"


@pytest.mark.parametrize("name", ["plain.pt", "with-hash-{hash}.pt", "plain.safetensors"])
@pytest.mark.parametrize("model", ["resnet18", OWN])
def test_a_local_file_is_found_where_it_was_named(model: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / name.format(hash=HASH)
    file.write_bytes(CONTENT)
    found = find_weights(model, str(file))
    assert (found.file, found.name, found.warning) == (str(file.resolve()), "file", "")
    assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("asked", ["~nobody-of-this-name/x.pth", "x" * 300 + ".pth"])
def test_a_path_that_cannot_be_is_one_line(asked: str) -> None:
    with pytest.raises(WeightsError, match=r"^weights '[^\n]{,200}$"):
        find_weights("resnet18", asked)


@pytest.mark.parametrize("asked", ["nowhere.pt", "some/where"])
@pytest.mark.parametrize("model", ["resnet18", OWN])
def test_a_file_that_is_not_there_is_named(model: str, asked: str) -> None:
    with pytest.raises(WeightsError, match=rf"'{asked}': no such file or folder"):
        find_weights(model, asked)


@pytest.mark.parametrize("model", ["resnet18", OWN])
@pytest.mark.parametrize("asked", ["https://example.org/w.pth", "file:///tmp/w.pth", "s3://b/w"])
def test_a_url_is_not_a_file(model: str, asked: str) -> None:
    with pytest.raises(WeightsError) as caught:
        find_weights(model, asked)
    assert str(caught.value) == (
        f"weights {asked!r}: a URL is not accepted: download the file and give its path"
    )


def test_a_folder_that_is_none_of_a_trial_is_told_without_python_s_words(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        find_weights("resnet18", str(tmp_path))
    assert str(caught.value) == (
        f"weights {str(tmp_path)!r}: no checkpoint of a trial in this folder; give a file, or a "
        "folder such as runs/NAME/trials/t0001"
    )


@pytest.mark.parametrize("model", ["resnet18", OWN])
def test_random_weights_need_nothing(model: str, torch_home: Path) -> None:
    found = find_weights(model, None)
    assert (found.file, found.name, found.warning) == (None, "random", "")
    assert not torch_home.exists()


def test_auto_is_random_for_a_network_of_one_s_own_without_a_warning(torch_home: Path) -> None:
    found = find_weights(OWN, "auto")
    assert (found.asked, found.file, found.name, found.warning) == ("auto", None, "random", "")
    assert not torch_home.exists()


@pytest.mark.parametrize("asked", ["DEFAULT", "IMAGENET1K_V1", "whatever"])
def test_a_custom_network_has_no_weights_by_name(asked: str) -> None:
    with pytest.raises(
        WeightsError, match=rf"'{asked}': there are none by name .*{re.escape(OWN)}.*None or 'auto'"
    ):
        find_weights(OWN, asked)


@pytest.mark.parametrize(
    ("asked", "near"), [("IMAGENET1K_V3", "IMAGENET1K_V1"), ("DEFAUL", "DEFAULT")]
)
def test_unknown_weights_are_refused_with_the_nearest_name(asked: str, near: str) -> None:
    with pytest.raises(WeightsError, match=rf"'{asked}' of resnet18 .*did you mean '{near}'\?"):
        find_weights("resnet18", asked)


def test_a_name_in_full_of_another_network_is_refused_with_the_nearest_one() -> None:
    told = r"of resnet34 are unknown; did you mean 'ResNet34_Weights\.IMAGENET1K_V1'\?"
    with pytest.raises(WeightsError, match=told):
        find_weights("resnet34", "ResNet18_Weights.IMAGENET1K_V1")
    with pytest.raises(WeightsError, match="there are none by name for a custom network"):
        find_weights(OWN, "ResNet18_Weights.IMAGENET1K_V1")


def test_a_name_in_full_has_the_preprocessing_of_those_weights() -> None:
    short = preprocessing_of(config_of("resnet50", weights="IMAGENET1K_V1"), None)
    in_full = preprocessing_of(
        config_of("resnet50", weights="ResNet50_Weights.IMAGENET1K_V1"), None
    )
    assert in_full == short
    assert short != preprocessing_of(config_of("resnet50", weights="IMAGENET1K_V2"), None)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"other")])
def test_a_file_that_changed_since_it_was_found_is_told(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(CONTENT)
    found = find_weights("resnet18", str(file)).as_dict()
    require_same_weights(found)
    spoil(file)
    with pytest.raises(WeightsError, match=r"w\.pt (cannot be read|have changed)"):
        require_same_weights(found)


def offer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision's list for every model hold one entry, at `url`."""
    entry = Weights(url=url, transforms=partial(ImageClassification, crop_size=224), meta={})

    class Tiny_Weights(WeightsEnum):  # noqa: N801 - torchvision's way of naming them
        IMAGENET1K_V1 = entry
        DEFAULT = IMAGENET1K_V1

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda model: Tiny_Weights)


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the file would be that torchvision's list offers."""
    file = tmp_path / "offered" / GOOD_NAME
    file.parent.mkdir()
    offer(file.as_uri(), monkeypatch)
    yield file


@pytest.mark.parametrize(
    "asked", ["auto", "DEFAULT", "IMAGENET1K_V1", "Tiny_Weights.IMAGENET1K_V1"]
)
def test_named_weights_are_fetched_once(asked: str, offered: Path, torch_home: Path) -> None:
    offered.write_bytes(CONTENT)
    found = find_weights("resnet18", asked)
    assert found.file == str(torch_home / GOOD_NAME)
    assert (torch_home / GOOD_NAME).read_bytes() == CONTENT
    assert (found.asked, found.name, found.warning) == (asked, "Tiny_Weights.IMAGENET1K_V1", "")
    offered.unlink()
    assert find_weights("resnet18", asked) == found


@pytest.mark.usefixtures("offered")
def test_auto_without_network_is_random_with_a_warning_that_says_where_to_put_the_file(
    torch_home: Path,
) -> None:
    found = find_weights("resnet18", "auto")
    assert (found.file, found.name) == (None, "random")
    assert "resnet18 starts from RANDOM weights" in found.warning
    assert f"put the file at {torch_home / GOOD_NAME}" in found.warning


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("asked", ["DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_without_network_are_an_error_that_says_where_to_put_the_file(
    asked: str, torch_home: Path
) -> None:
    with pytest.raises(WeightsError) as caught:
        find_weights("resnet18", asked)
    assert f"put the file at {torch_home / GOOD_NAME}" in str(caught.value)
    assert "cannot be downloaded" in str(caught.value)


@pytest.mark.usefixtures("offered")
def test_a_damaged_file_of_torchvision_s_is_an_error_by_name_and_a_warning_with_auto(
    torch_home: Path,
) -> None:
    torch_home.mkdir(parents=True)
    (torch_home / GOOD_NAME).write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(WeightsError, match=rf"{GOOD_NAME} is damaged"):
        find_weights("resnet18", "DEFAULT")
    found = find_weights("resnet18", "auto")
    assert found.file is None
    assert "is damaged" in found.warning


def test_a_file_of_torchvision_s_that_was_damaged_since_is_not_loaded(
    own_state: State, torch_home: Path
) -> None:
    torch_home.mkdir(parents=True)
    file = saved(own_state, torch_home / "own-00000000.pth")
    with pytest.raises(WeightsError, match=r"own-00000000\.pth is damaged"):
        load_weights(OwnNet(5), config_of(OWN), file)


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
        # A network of one's own, as most of ImageNet's are.
        (OWN, None, None, None, (256, 224)),
        (OWN, "auto", 64, None, (73, 64)),
        (OWN, "my/file.pt", None, 32, (32, 32)),
    ],
)
def test_images_are_prepared_as_the_weights_were_evaluated(
    model: str,
    asked: str | None,
    image_size: int | None,
    native_size: int | None,
    resize_and_crop: tuple[int, int],
) -> None:
    config = config_of(model, weights=asked, image_size=image_size)
    got = preprocessing_of(config, native_size)
    assert got == Preprocessing(*resize_and_crop, "bilinear", *IMAGENET)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Preprocessing(232, 224, "bilinear", *IMAGENET)),
        ({"mean": [0.0, 0, 0]}, Preprocessing(232, 224, "bilinear", (0, 0, 0), IMAGENET[1])),
        ({"std": (1, 1, 1)}, Preprocessing(232, 224, "bilinear", IMAGENET[0], (1, 1, 1))),
        ({"interpolation": "bicubic"}, Preprocessing(232, 224, "bicubic", *IMAGENET)),
        ({"interpolation": "nearest"}, Preprocessing(232, 224, "nearest", *IMAGENET)),
        ({"resize_size": 224}, Preprocessing(224, 224, "bilinear", *IMAGENET)),
        (
            {
                "mean": (0.1, 0.2, 0.3),
                "std": (0.4, 0.5, 0.6),
                "interpolation": "bicubic",
                "resize_size": 300,
            },
            Preprocessing(300, 224, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ),
    ],
)
def test_the_weights_own_preprocessing_gives_way_to_what_is_asked(
    given: dict[str, Any], wanted: Preprocessing
) -> None:
    got = preprocessing_of(config_of("resnet50", preprocess=Preprocess(**given)), None)
    assert got == wanted
    assert hash(got) == hash(wanted)  # a list would have none, and trials could not share a store


@pytest.mark.parametrize(
    ("model", "image_size", "native_size", "crop"),
    [("resnet50", None, None, 224), ("resnet50", 256, None, 256), (OWN, None, 64, 64)],
)
def test_images_cannot_be_made_smaller_than_what_is_cropped_from_them(
    model: str, image_size: int | None, native_size: int | None, crop: int
) -> None:
    def config(resize_size: int) -> TrialConfig:
        preprocess = Preprocess(resize_size=resize_size)
        return config_of(model, image_size=image_size, preprocess=preprocess)

    assert preprocessing_of(config(crop), native_size).resize_size == crop
    with pytest.raises(ConfigError, match=rf"resize_size {crop - 1} .*{crop} x {crop}") as caught:
        preprocessing_of(config(crop - 1), native_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", FAMILIES)
def test_every_entry_of_torchvision_has_a_preprocessing_that_could_be_asked_for(model: str) -> None:
    for entry in torchvision.models.get_model_weights(model):
        got = preprocessing_of(config_of(model, weights=entry.name), None)
        preset = entry.transforms()
        assert (got.resize_size, got.crop_size) == (*preset.resize_size, *preset.crop_size)
        assert (list(got.mean), list(got.std)) == (list(preset.mean), list(preset.std))
        assert got.interpolation == preset.interpolation.value
        assert got.interpolation in INTERPOLATIONS


def test_the_embedded_scans_say_their_size_and_folders_do_not() -> None:
    assert ImageSet(None, ("0", "1"), ()).native_size == 32
    assert ImageSet(Path("x"), ("0", "1"), ()).native_size is None
