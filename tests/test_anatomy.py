"""Counts against torchvision's own published numbers, and against counts by hand."""

import copy
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from tuneapp.anatomy import read_anatomy
from tuneapp.errors import ConfigError
from tuneapp.fit import skeleton
from tuneapp.models import FAMILIES
from tuneapp.staged import StagedModel

# torchvision counts Inception's auxiliary classifier in; we build it only with aux_weight > 0.
INCEPTION_AUX = (
    (768 * 128 + 2 * 128)  # conv0, 1 x 1, and its norm
    + (128 * 768 * 5 * 5 + 2 * 768)  # conv1, 5 x 5, and its norm
    + (768 * 1000 + 1000)  # fc
)

# Of each family the ends: its other members differ in depth and width alone.
PUBLISHED = (
    *("alexnet", "convnext_tiny", "convnext_base", "densenet121", "densenet161"),
    *("efficientnet_b0", "efficientnet_b5", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_small"),
    *("mobilenet_v3_large", "regnet_x_400mf", "regnet_y_128gf", "resnet18", "resnet50"),
    *("resnext50_32x4d", "wide_resnet50_2", "shufflenet_v2_x0_5", "shufflenet_v2_x2_0"),
    *("squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg16_bn"),
    *("vit_b_16", "vit_h_14"),
)

OWN_NETWORK = '''
import torch
from torch import nn

class Own(nn.Module):
    """ReLU and pooling are called twice, and stand where their first call is."""
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.head(self.attention(x.flatten(2).mT).mean(1))

class Listed(nn.Module):
    """Its blocks are in a list, which nobody calls, and are called in turns with others.

    Nor is `spare` called: its weight is used by a function.
    """
    def __init__(self, classes):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.between = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, classes)
        self.spare = nn.Linear(3, 3)

    def stages(self):
        return {"blocks": [self.blocks], "between": self.between, "spare": self.spare,
                "head": self.head}

    def forward(self, x):
        x = self.blocks[1](self.between(self.blocks[0](x))).mean((2, 3))
        return self.head(nn.functional.linear(x, self.spare.weight, self.spare.bias))

class SharedLate(nn.Module):
    """Its one ReLU is kept with the last convolution; its blocks share another one."""
    def __init__(self, classes):
        super().__init__()
        act = nn.ReLU()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), act)
        self.conv2 = nn.Sequential(nn.Conv2d(4, 5, 3, stride=2), act)
        self.conv3 = nn.Conv2d(5, 6, 3)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        return self.head(self.conv3(x).mean((2, 3)))

class Unnamed(nn.Module):
    """Its dropout and pooling are in none of its stages, like functions."""
    def __init__(self, classes):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, classes)

    def stages(self):
        return {"conv": self.conv, "head": self.fc}

    def forward(self, x):
        return self.fc(self.drop(self.pool(self.conv(x)).mean((2, 3))))

class Inside(nn.Module):
    """A block of one stage calls a module of another one, and adds to it."""
    class Block(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.borrowed = nn.Conv2d(4, 4, 1), [norm]

        def forward(self, x):
            return nn.functional.avg_pool2d(self.borrowed[0](self.conv(x)), 2)

    def __init__(self, classes):
        super().__init__()
        self.norm = nn.Conv2d(3, 4, 1)
        between = nn.Conv2d(4, 4, 1)
        self.block = Inside.Block(between)
        self.between = between
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.block(self.norm(x)).mean((2, 3)))

class Tuples(nn.Module):
    """A stage returns several tensors, another one a dict."""
    class Second(nn.Linear):
        def forward(self, x):
            return {"x": super().forward(x)}

    def __init__(self, classes):
        super().__init__()
        self.memory = nn.LSTM(3, 4, batch_first=True)
        self.second, self.head = Tuples.Second(4, 4), nn.Linear(4, classes)

    def forward(self, x):
        out, _ = self.memory(x.flatten(2).mT)
        return self.head(self.second(out.mean(1))["x"])

def pooled_in_the_head(classes):
    stem = nn.Conv2d(3, 4, 1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    network = nn.Sequential(stem, head)
    network.stages = lambda: {"stem": stem, "head": head}
    return network

def only_28(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, classes))
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "anatomy_own.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "anatomy_own", raising=False)
    return "anatomy_own"


def test_every_family_is_compared_with_what_is_published() -> None:
    compared = [FAMILIES[model] for model in PUBLISHED]
    assert [name for name, family in FAMILIES.items() if family not in compared] == []


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_and_flops_are_those_that_torchvision_publishes(model: str) -> None:
    meta = torchvision.models.get_model_weights(model).DEFAULT.meta
    anatomy = read_anatomy(model)
    left_out = INCEPTION_AUX if model == "inception_v3" else 0
    assert anatomy.parameters == meta["num_params"] - left_out
    # It gives 1e9 multiply-adds, each of which is two operations, to three decimals.
    assert round(anatomy.flops / 2e9, 3) == meta["_ops"]
    assert anatomy.stages[0].trainable == anatomy.parameters
    assert anatomy.stages[-1].output == (1000,)


def test_resnet18_by_hand() -> None:
    anatomy = read_anatomy("resnet18")
    assert (anatomy.model, anatomy.image_size) == ("resnet18", 224)
    assert [(s.name, s.output) for s in anatomy.stages] == [
        ("stem", (64, 56, 56)),
        ("layer1", (64, 56, 56)),
        ("layer2", (128, 28, 28)),
        ("layer3", (256, 14, 14)),
        ("layer4", (512, 7, 7)),
        ("head", (1000,)),
    ]

    def layer(before: int, width: int) -> int:
        """Four 3 x 3 convolutions, the 1 x 1 beside the first two, and five norms."""
        return 9 * before * width + 3 * 9 * width**2 + before * width + 5 * 2 * width

    held = [
        3 * 64 * 7 * 7 + 2 * 64,
        4 * 9 * 64**2 + 4 * 2 * 64,
        layer(64, 128),
        layer(128, 256),
        layer(256, 512),
        512 * 1000 + 1000,
    ]
    assert [s.parameters for s in anatomy.stages] == held
    assert [s.trainable for s in anatomy.stages] == [sum(held[k:]) for k in range(6)]
    stem, head = anatomy.stages[0], anatomy.stages[-1]
    assert stem.flops == 2 * (3 * 7 * 7) * 64 * 112 * 112
    assert head.flops == 2 * 512 * 1000


def test_attention_is_counted_in_a_vision_transformer() -> None:
    tokens, width, mlp = 14 * 14 + 1, 768, 3072
    block = read_anatomy("vit_b_16").stages[1]
    assert (block.name, block.output) == ("block1", (tokens, width))
    projections = tokens * width * 3 * width + tokens * width * width
    attention = 2 * tokens * tokens * width
    assert block.flops == 2 * (projections + attention + 2 * tokens * width * mlp)


def test_another_image_size_changes_outputs_and_flops_and_a_transformer_s_positions() -> None:
    assert read_anatomy("inception_v3").image_size == 299
    small = read_anatomy("resnet18", 64)
    assert [s.output for s in small.stages][:2] == [(64, 16, 16), (64, 16, 16)]
    large = read_anatomy("resnet18", 128)
    assert large.stages[2].flops == 4 * small.stages[2].flops
    vit, vit_small = read_anatomy("vit_b_32"), read_anatomy("vit_b_32", 64)
    assert vit.parameters - vit_small.parameters == (7 * 7 - 2 * 2) * 768


def test_a_network_of_one_s_own_is_followed_from_stage_to_stage(own: str) -> None:
    anatomy = read_anatomy(f"{own}:Own", 16)
    assert [(s.name, s.output) for s in anatomy.stages] == [
        ("conv1", (4, 8, 8)),
        ("conv2", (8, 4, 4)),
        ("attention", (16, 8)),
        ("head", (10,)),
    ]
    tokens, width = 16, 8
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * 16
    assert [s.flops for s in anatomy.stages] == [
        2 * 9 * 3 * 4 * 16 * 16,
        2 * 9 * 4 * 8 * 8 * 8,
        2 * attention,
        2 * 8 * 10,
    ]
    held = [s.parameters for s in anatomy.stages]
    assert held[:2] + held[3:] == [9 * 3 * 4 + 4, 9 * 4 * 8 + 8, 8 * 10 + 10]
    assert [s.trainable for s in reversed(anatomy.stages)] == list(accumulate(reversed(held)))
    assert read_anatomy(f"{own}:Own").image_size == 224


def test_stages_called_in_turns_or_never_get_what_is_theirs(own: str) -> None:
    stages = {s.name: s for s in read_anatomy(f"{own}:Listed", 16).stages}
    assert {name: s.flops for name, s in stages.items()} == {
        "between": 2 * 9 * 3 * 3 * 16 * 16,
        "blocks": 2 * (2 * 3 * 3 * 16 * 16) + 2 * 3 * 3,  # with the function after them
        "spare": 0,
        "head": 2 * 3 * 10,
    }
    assert stages["blocks"].output == (3, 16, 16)
    assert stages["spare"].output is None
    assert stages["head"].output == (10,)


OWN_SPACE = "search_spaces.own_network:build"


@pytest.mark.parametrize(
    ("model", "size", "outputs"),
    [
        # `top` and not the mean and the dropout after it, which are in no stage.
        (OWN_SPACE, 32, [(32, 16, 16), (64, 8, 8), (128, 4, 4), (10,)]),
        ("Own", 16, [(4, 8, 8), (8, 4, 4), (16, 8), (10,)]),
        ("SharedLate", 64, [(4, 15, 15), (5, 3, 3), (6, 1, 1), (10,)]),
        ("Unnamed", 16, [(4, 14, 14), (10,)]),
        ("Inside", 16, [(4, 16, 16), (4, 8, 8), (4, 16, 16), (10,)]),
        ("Listed", 16, [(3, 16, 16), (3, 16, 16), None, (10,)]),
        ("Tuples", 16, [(256, 4), None, (10,)]),
        ("pooled_in_the_head", 16, [(4, 16, 16), (10,)]),
        (
            "timm:convnext_atto",
            64,
            [(40, 16, 16), (40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 1, 1), (1000,)],
        ),
        (
            "timm:resnet18",
            64,
            [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (1000,)],
        ),
        ("timm:vit_tiny_patch16_224", 64, [(17, 192)] * 13 + [(1000,)]),
    ],
)
def test_an_output_has_the_same_shape_as_a_feature_and_in_the_table(
    own: str, model: str, size: int, outputs: list[tuple[int, ...] | None]
) -> None:
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    elif model.isidentifier():
        model = f"{own}:{model}"
    anatomy = read_anatomy(model, size)
    assert [stage.output for stage in anatomy.stages] == outputs
    staged = copy.deepcopy(skeleton(model, size)).eval()
    named = [stage.name for stage in anatomy.stages if stage.output is not None]
    images = torch.zeros(2, 3, size, size, device=next(staged.parameters()).device)
    with torch.no_grad():
        features = staged(images, stages=named)
    shapes = [tuple(feature.shape[1:]) for feature in features]
    assert shapes == [output for output in outputs if output is not None]


def test_functions_and_shared_modules_count_for_the_stage_in_which_they_are_called(
    own: str,
) -> None:
    norm, block, between, head = read_anatomy(f"{own}:Inside", 16).stages
    assert norm.flops == 2 * 3 * 4 * 16 * 16
    assert between.flops == block.flops == 2 * 4 * 4 * 16 * 16
    assert head.flops == 2 * 4 * 10


def test_a_forward_pass_is_watched_without_a_second_one() -> None:
    staged = StagedModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    passes = []
    staged.network.register_forward_hook(lambda *call: passes.append(call))
    staged.train()(torch.zeros(2, 3, 8, 8), stages=["0", "1"])
    assert len(passes) == 1
    assert int(staged.network[1].num_batches_tracked) == 1


def test_the_clock_is_read_where_a_visit_begins() -> None:
    clock = iter(range(10))
    staged = StagedModel(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    )
    with staged.watching(lambda: next(clock)) as visits:
        staged.network(torch.zeros(2, 4))
    assert [(v.stage, v.begun) for v in visits] == [("0", 0), ("2", 1), ("3", 2)]
    assert [None if v.output is None else v.output.shape[1] for v in visits] == [4, 4, 2]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_of_attention_is_left_as_it_was(own: str, enabled: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(enabled)
        read_anatomy(f"{own}:Own", 16)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_nothing_of_the_watching_stays_on_a_network_of_one_s_own(own: str) -> None:
    first = read_anatomy(f"{own}:Own", 16)
    assert read_anatomy(f"{own}:Own", 16) == first


def test_what_a_network_says_of_its_stages_is_kept_though_a_layer_has_no_parameters(
    own: str,
) -> None:
    stem, head = read_anatomy(f"{own}:pooled_in_the_head", 16).stages
    assert (stem.name, stem.output, stem.flops) == ("stem", (4, 16, 16), 2 * 3 * 4 * 16 * 16)
    assert (head.name, head.output, head.flops) == ("head", (10,), 2 * 4 * 10)


def test_a_network_for_one_size_needs_that_size(own: str) -> None:
    with pytest.raises(ConfigError, match=r"224 x 224 pixels: .*; --image-size sets another size"):
        read_anatomy(f"{own}:only_28")
    (head,) = read_anatomy(f"{own}:only_28", 28).stages
    assert head.flops == 2 * 3 * 28 * 28 * 10


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        ("vgg11", 20, r"vgg11 cannot take images of 20 x 20 pixels .*; 32 is possible"),
        ("vit_b_16", 100, r"vit_b_16 cannot take images of 100 x 100 .*; 128 is possible"),
        ("resnet18", 8, r"image_size must be .*>= 16, got 8"),
        ("resnet81", None, r"model 'resnet81' is unknown; did you mean 'resnet18'\?"),
        ("no.such:build", None, r"model 'no\.such:build': cannot import no\.such"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    model: str, size: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_anatomy(model, size)
