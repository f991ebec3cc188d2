"""timm's networks, with timm itself as the judge: its modules, its loading, its transforms."""

import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from tests.states import config_of, saved
from tests.test_trial import batches_of, require_exact_resume
from tuneapp.anatomy import read_anatomy
from tuneapp.config import Constant, Sgd, TrialConfig, is_reference
from tuneapp.data.examples import ImageSet
from tuneapp.effective import config_hash, effective
from tuneapp.errors import AppliedValueError, ConfigError, WeightsError
from tuneapp.fit import check_image_size, check_model, skeleton
from tuneapp.models import build_staged, find_family, read_dropout
from tuneapp.optim import build_optimizer
from tuneapp.staged import StagedModel
from tuneapp.timm_models import (
    build_timm,
    find_timm,
    is_of_timm,
    takes_dropout,
    translated,
    usual_preprocessing,
    weights_of,
)
from tuneapp.training import begin_training
from tuneapp.trial import TrialRun
from tuneapp.weights import find_weights, load_weights, preprocessing_of

# --- The cuts, written by hand --------------------------------------------------------------------

# For each stage, in order, what the names of its parameters begin with.
Cuts = dict[str, str]


def numbered(path: str, count: int, **also: str) -> Cuts:
    """Stages `path.0`, `path.1`, ...; `also` adds to the `first` or the `last` of them."""
    cuts = {f"{path}.{i}": f"{path}.{i}." for i in range(count)}
    cuts[f"{path}.{count - 1}"] += " " + also.get("last", "")
    return cuts


VIT_STEM = "cls_token pos_embed patch_embed."
CUTS: dict[str, Cuts] = {
    "resnet10t": {
        "stem": "conv1. bn1.",
        **{f"layer{i}": f"layer{i}." for i in range(1, 5)},
        "head": "fc.",
    },
    "convnext_atto": {
        "stem": "stem.",
        **numbered("stages", 4, last="head.norm."),
        "head": "head.fc.",
    },
    "vit_tiny_patch16_224": {
        "stem": VIT_STEM,
        **numbered("blocks", 12, last="norm."),
        "head": "head.",
    },
    "deit_tiny_distilled_patch16_224": {
        "stem": f"{VIT_STEM} dist_token",
        **numbered("blocks", 12, last="norm."),
        "head": "head. head_dist.",
    },
    "swin_tiny_patch4_window7_224": {
        "stem": "patch_embed.",
        **numbered("layers", 4, last="norm."),
        "head": "head.fc.",
    },
    "efficientnet_b0": {
        "stem": "conv_stem. bn1.",
        **numbered("blocks", 7, last="conv_head. bn2."),
        "head": "classifier.",
    },
    "tf_mobilenetv3_small_minimal_100": {
        "stem": "conv_stem. bn1.",
        **numbered("blocks", 6, last="conv_head."),
        "head": "classifier.",
    },
    "mobilenetv4_conv_small": {
        "stem": "conv_stem. bn1.",
        **numbered("blocks", 5, last="conv_head. norm_head."),
        "head": "classifier.",
    },
    "levit_128s": {
        "stem": "stem.",
        **numbered("stages", 3, last="head.bn. head_dist.bn."),
        "head": "head.linear. head_dist.linear.",
    },
    "gmlp_ti16_224": {"stem": "stem.", **numbered("blocks", 30, last="norm."), "head": "head."},
    "regnetx_002": {
        "stem": "stem.",
        **{f"s{i}": f"s{i}." for i in range(1, 5)},
        "head": "head.fc.",
    },
    "densenet121": {
        "stem": "features.conv0. features.norm0.",
        "features.denseblock1": "features.denseblock1. features.transition1.",
        "features.denseblock2": "features.denseblock2. features.transition2.",
        "features.denseblock3": "features.denseblock3. features.transition3.",
        "features.denseblock4": "features.denseblock4. features.norm5.",
        "head": "classifier.",
    },
    "xcit_nano_12_p16_224": {
        "stem": VIT_STEM,
        **numbered("blocks", 12),
        **numbered("cls_attn_blocks", 2, last="norm."),
        "head": "head.",
    },
    "edgenext_xx_small": {
        "stem": "stem.",
        **numbered("stages", 4, last="head.norm."),
        "head": "head.fc.",
    },
    "maxvit_rmlp_pico_rw_256": {
        "stem": "stem.",
        **numbered("stages", 4, last="norm."),
        "head": "head.fc.",
    },
    "test_nfnet": {
        "stem": "stem.",
        **numbered("stages", 4, last="final_conv."),
        "head": "head.fc.",
    },
    # It calls its last blocks `head`.
    "selecsls42": {
        "stem": "stem.",
        "features.0": "features.0.",
        "features.1": "features.1.",
        "features.2": "features.2.",
        "features.3": "features.3.",
        "features.4": "features.4.",
        "features.5": "features.5.",
        "stage7": "head.",
        "head": "fc.",
    },
    # Its blocks share their position embeddings, which therefore have several names each.
    "coat_lite_tiny": {
        "stem": "cls_token1 patch_embed1. cpe1. crpe1.",
        "serial_blocks1.0.norm1": "serial_blocks1.0.",
        "serial_blocks1.1.norm1": "serial_blocks1.1.",
        "cls_token2": "cls_token2 patch_embed2. cpe2. crpe2.",
        "serial_blocks2.0.norm1": "serial_blocks2.0.",
        "serial_blocks2.1.norm1": "serial_blocks2.1.",
        "cls_token3": "cls_token3 patch_embed3. cpe3. crpe3.",
        "serial_blocks3.0.norm1": "serial_blocks3.0.",
        "serial_blocks3.1.norm1": "serial_blocks3.1.",
        "cls_token4": "cls_token4 patch_embed4. cpe4. crpe4.",
        "serial_blocks4.0.norm1": "serial_blocks4.0.",
        "serial_blocks4.1.norm1": "serial_blocks4.1. norm4.",
        "head": "head.",
    },
}

# What is called: names from timm, and the pixels of the images that they are tried with.
SMALL = {
    "convnext_atto": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "densenet121": 32,
    "edgenext_xx_small": 64,
    "efficientnet_b0": 32,
    "levit_128s": 64,
    "mobilenetv4_conv_small": 32,
    "regnetx_002": 32,
    "resnet10t": 32,
    "test_byobnet": 64,
    "test_mambaout": 64,
    "test_maxvit": 64,
    "test_nfnet": 64,
    "test_vit": 32,
    "tf_mobilenetv3_small_minimal_100": 32,
    "xcit_nano_12_p16_224": 32,
}
every_small = pytest.mark.parametrize("name", SMALL)
CLASSES = 7


def images_for(name: str, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, SMALL[name], SMALL[name], generator=generator)


@lru_cache
def _built(name: str) -> StagedModel:
    torch.manual_seed(3)
    config = config_of(f"timm:{name}", weights=None)
    staged = build_staged(config, CLASSES, SMALL[name])
    with torch.no_grad():
        for parameter in staged.parameters():  # some heads and scales begin at zero
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return staged


def built(name: str) -> StagedModel:
    """A network with numbers none of which is zero; each call returns another copy."""
    staged = deepcopy(_built(name))
    return StagedModel(staged.network, find_family(f"timm:{name}"))


def names_in(staged: StagedModel, *stages: str) -> set[str]:
    held = {id(p) for s in staged.stages if s.name in stages for p in s.parameters()}
    return {name for name, p in staged.network.named_parameters() if id(p) in held}


@pytest.mark.parametrize("name", CUTS)
def test_the_stages_are_those_written_here(name: str) -> None:
    staged = skeleton(f"timm:{name}")
    cuts = CUTS[name]
    assert [stage.name for stage in staged.stages] == list(cuts)
    for stage, prefixes in cuts.items():
        begins = tuple(prefixes.split())
        of_others = tuple(p for s, text in cuts.items() if s != stage for p in text.split())
        found = names_in(staged, stage)
        assert {n for n, _ in staged.network.named_parameters() if n.startswith(begins)} == found
        # Of two beginnings, such as `head.` and `head.norm.`, none begins with the other.
        assert not any(b.startswith(o) for b in begins for o in of_others)
    held = [id(p) for stage in staged.stages for p in stage.parameters()]
    assert sorted(held) == sorted(id(p) for p in staged.network.parameters())


@every_small
def test_the_head_is_what_timm_calls_the_classifier_and_has_the_size_asked_for(name: str) -> None:
    staged = built(name)
    heads = timm.get_pretrained_cfg(name).classifier
    heads = (heads,) if isinstance(heads, str) else heads
    wanted = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert names_in(staged, "head") == wanted
    assert staged.stages[-1].name == "head"
    for head in heads:
        assert len(staged.network.get_submodule(head).weight) == CLASSES
    assert staged.eval()(images_for(name)).shape == (2, CLASSES)


@every_small
def test_the_logits_are_timms_own_to_the_bit(name: str) -> None:
    staged = built(name).eval()
    size = {"img_size": SMALL[name]} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    theirs = timm.create_model(name, num_classes=CLASSES, **size).eval()
    theirs.load_state_dict(staged.network.state_dict())
    with torch.no_grad():
        assert torch.equal(staged(images_for(name)), theirs(images_for(name)))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "regnetx_002", "edgenext_xx_small"])
def test_the_outputs_of_stages_are_the_features_that_timm_gives(name: str) -> None:
    staged = built(name).eval()
    names = [stage.name for stage in staged.stages]
    with torch.no_grad():
        features = staged.network.forward_intermediates(
            images_for(name), intermediates_only=True, output_fmt="NCHW"
        )
        # The stem is a feature of some; the last stage has the pooling with it, or a norm.
        wanted = features[-4:-1]
        got = staged(images_for(name), stages=names[1:4])
    assert [torch.equal(a, b) for a, b in zip(got, wanted, strict=True)] == [True] * 3


def test_the_outputs_of_a_transformers_stages_are_those_of_its_blocks() -> None:
    staged = built("test_vit").eval()
    noted: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        noted[name] = output

    net = staged.network
    ends = {"stem": net.norm_pre, "blocks.0": net.blocks[0], "blocks.5": net.norm}
    for name, module in ends.items():
        module.register_forward_hook(partial(note, name))
    with torch.no_grad():
        got = staged(images_for("test_vit"), stages=["blocks.5", "stem", "blocks.0"])
    wanted = [noted["blocks.5"], noted["stem"], noted["blocks.0"]]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not torch.equal(noted["stem"], noted["blocks.0"])


# --- Freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0], ids=["nothing", "half", "all but the head"])
@every_small
def test_a_step_changes_what_is_not_frozen_and_nothing_else(name: str, part: float) -> None:
    staged = built(name)
    depth = round(part * (len(staged.stages) - 1))
    staged.freeze(depth)
    frozen = names_in(staged, *[stage.name for stage in staged.stages[:depth]])
    assert [p for n, p in staged.network.named_parameters() if p.requires_grad] == [
        p for n, p in staged.network.named_parameters() if n not in frozen
    ]
    before = {n: t.clone() for n, t in staged.network.state_dict().items()}
    config = config_of(f"timm:{name}", weights=None, freeze_depth=depth)
    config = replace(config, optimizer=Sgd(lr=0.5, weight_decay=0.1))
    optimizer = build_optimizer(staged, config)
    staged.train()(images_for(name)).square().sum().backward()
    optimizer.step()
    # A parameter that the loss does not reach has no gradient, and so no step.
    reached = {n for n, p in staged.network.named_parameters() if p.grad is not None}
    after = staged.network.state_dict()
    own = dict(staged.network.named_parameters())
    assert {n for n in own if not torch.equal(before[n], after[n])} == own.keys() - frozen
    assert reached == own.keys() - frozen
    # Statistics of BatchNorm too: those of frozen stages stay, all others move.
    norms = [(k, m) for k, m in staged.network.named_modules() if isinstance(m, _BatchNorm)]
    for path, norm in norms:
        moved = not torch.equal(before[f"{path}.running_mean"], norm.running_mean)
        assert moved == norm.training == (f"{path}.weight" not in frozen), path


@every_small
def test_dropout_before_the_classifier_is_the_heads_and_all_below_is_quiet(name: str) -> None:
    model = f"timm:{name}"
    if not takes_dropout(model)[0]:
        pytest.skip("it takes no dropout")
    outputs = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(3)
        config = config_of(model, weights=None, dropout=dropout, stochastic_depth=None)
        staged = build_staged(config, CLASSES, SMALL[name])
        staged.network.load_state_dict(_built(name).network.state_dict())
        staged.freeze(len(staged.stages) - 1)
        staged.train()
        with torch.no_grad():
            outputs.append([staged(images_for(name)) for _ in range(2)])
    (quiet, quiet_again), (one, other) = outputs
    assert torch.equal(quiet, quiet_again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, quiet)


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "test_vit", "densenet121"])
def test_every_dropout_layer_before_a_classifier_trains_while_all_else_is_frozen(name: str) -> None:
    # repvit's stands before a norm that is not of the head, levit's in a head with a norm.
    staged = build_staged(config_of(f"timm:{name}", weights=None, dropout=0.5), CLASSES)
    staged.freeze(len(staged.stages) - 1)
    staged.train()
    drops = {p: m for p, m in staged.network.named_modules() if getattr(m, "p", 0) == 0.5}
    assert drops
    assert [path for path, module in drops.items() if not module.training] == []


@every_small
def test_modules_between_stages_belong_to_one_and_pooling_before_the_head_to_the_head(
    name: str,
) -> None:
    staged = built(name)
    placed = Counter(id(m) for stage in staged.stages for m in stage.module.modules())
    leaves = {p: m for p, m in staged.network.named_modules() if not [*m.children()]}
    assert {p: placed[id(m)] for p, m in leaves.items() if placed[id(m)] != 1} == {}
    in_head = {type(m).__name__ for m in staged.stages[-1].module.modules()}
    if name in ("resnet10t", "densenet121", "efficientnet_b0"):
        assert "SelectAdaptivePool2d" in in_head
    if name == "tf_mobilenetv3_small_minimal_100":  # pools before its last convolution
        assert "SelectAdaptivePool2d" not in in_head


# --- Dropout and stochastic depth -----------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, 0.37])
@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "efficientnet_b0", "levit_128s", "test_vit"]
)
def test_what_is_set_is_read_back_exactly(name: str, value: float) -> None:
    model = f"timm:{name}"
    assert takes_dropout(model) == (True, True)
    network = build_timm(model, CLASSES, dropout=value)
    assert read_dropout(network)[0] == (value,)
    # At 0 too, where timm builds most networks without such layers: the space may ask for 0.
    network = build_timm(model, CLASSES, stochastic_depth=value)
    assert read_dropout(network) == ((0.0,), value)


def test_stochastic_depth_rises_over_the_blocks_as_timm_has_it() -> None:
    theirs = timm.create_model("test_vit", drop_path_rate=0.3)
    ours = build_timm("timm:test_vit", CLASSES, stochastic_depth=0.3)

    def rates(network: Any) -> list[float]:
        return [float(getattr(block.drop_path1, "drop_prob", 0.0)) for block in network.blocks]

    assert rates(ours) == pytest.approx(rates(theirs))
    assert rates(ours) == pytest.approx([0.06 * i for i in range(6)])


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_stochastic_depth_drops_whole_branches_or_none(value: float) -> None:
    network = build_timm("timm:convnext_atto", CLASSES, stochastic_depth=value).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
        one, other = (network(images_for("convnext_atto")) for _ in range(2))
    assert torch.equal(one, other) == (value == 0.0)


@pytest.mark.parametrize(
    ("name", "dropout", "stochastic_depth", "told"),
    [
        ("repvit_m0_9", None, 0.1, "stochastic_depth: timm:repvit_m0_9 has none"),
        ("densenet121", None, 0.0, "stochastic_depth: timm:densenet121 has none"),
        # Its attention has dropout layers that stay at what they are.
        (
            "maxvit_rmlp_pico_rw_256",
            0.2,
            None,
            "dropout: timm:maxvit_rmlp_pico_rw_256 takes none in timm",
        ),
        ("maxvit_rmlp_pico_rw_256", None, 0.2, ""),
        ("densenet121", 0.2, None, ""),
        ("convnext_atto", 0.0, 0.0, ""),
    ],
)
def test_what_a_network_does_not_take_is_refused_before_anything_is_trained(
    name: str, dropout: float | None, stochastic_depth: float | None, told: str
) -> None:
    config = config_of(f"timm:{name}", dropout=dropout, stochastic_depth=stochastic_depth)
    mistakes = check_model(config)
    assert len(mistakes) == bool(told)
    assert all(mistake.startswith(told) and "leave it None" in mistake for mistake in mistakes)


def test_auxiliary_classifiers_are_refused() -> None:
    (mistake,) = check_model(config_of("timm:inception_v3", aux_weight=0.3))
    assert mistake.startswith("aux_weight: timm:inception_v3 has no auxiliary classifiers")


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
@pytest.mark.parametrize(("dropout", "skips"), [(0.0, 0.0), (0.4, 0.2), (None, None)])
def test_the_proof_finds_what_was_asked(
    name: str, dropout: float | None, skips: float | None, config: TrialConfig, run: TrialRun
) -> None:
    config = replace(
        config, model=f"timm:{name}", freeze_depth=-1, dropout=dropout, stochastic_depth=skips
    )
    training = begin_training(config, run)
    training.enter(epoch=1)
    applied = training.state.applied_in(1)
    assert applied["dropout"] == (dropout or 0.0,)
    assert applied["stochastic_depth"] == skips


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"dropout": 0.5}, r"dropout is \(0.0,\), not 0.5"),
        ({"stochastic_depth": 0.5}, "stochastic_depth is None, not 0.5"),
    ],
)
def test_the_proof_finds_what_was_asked_and_not_set(
    values: dict[str, float],
    told: str,
    config: TrialConfig,
    run: TrialRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgetful(config: TrialConfig, *args: Any, **options: Any) -> StagedModel:
        return build_staged(replace(config, dropout=None, stochastic_depth=None), *args, **options)

    monkeypatch.setattr("tuneapp.training.build_staged", forgetful)
    config = replace(config, model="timm:resnet10t", freeze_depth=-1, **values)
    training = begin_training(config, run)
    with pytest.raises(AppliedValueError, match=told):
        training.enter(epoch=1)


def test_only_timms_networks_are_read_as_timms() -> None:
    assert is_of_timm(build_timm("timm:test_vit", CLASSES))
    assert not is_of_timm(nn.Linear(2, 2))


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("timm:resnet50dd", "timm .* has no 'resnet50dd'; did you mean 'resnet50d'"),
        ("timm:", "has no ''"),
        ("timm:resnet50d.a1_in1k", "write model='timm:resnet50d', weights='a1_in1k'$"),
        ("timm:resnet50q.a1_in1k", "has no 'resnet50q'"),
        # timm still builds these by their old names, and knows nothing of them.
        ("timm:tv_resnet34", "write model='timm:resnet34', weights='tv_in1k'$"),
        ("timm:vit_base_patch16_224_in21k", "model='timm:vit_base_patch16_224', weights='augreg_"),
        ("timm:caformer_s18", "says no stages of it .*'package.module:build'"),
        ("timm:deepseek_vit_412m_enc", "no classifier in timm's words; .*'package.module:build'"),
    ],
)
def test_a_network_that_cannot_be_had_is_refused_in_one_line(model: str, told: str) -> None:
    (mistake,) = check_model(config_of(model))
    assert re.search(told, mistake)
    assert mistake.startswith(f"model {model!r}")
    assert "\n" not in mistake


def test_a_network_that_somebody_registered_without_a_word_of_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from timm.models import _registry

    entrypoints = _registry._model_entrypoints
    monkeypatch.setitem(entrypoints, "of_my_own", entrypoints["resnet10t"])
    with pytest.raises(ConfigError, match="has nothing to say of 'of_my_own'; return it from"):
        find_timm("timm:of_my_own")


def test_without_timm_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python itself does to forbid an import
    find_timm.cache_clear()
    skeleton_of = check_model(config_of("timm:test_convnext2"))
    assert len(skeleton_of) == 1
    assert re.search(
        r"^model 'timm:test_convnext2' needs timm \(.*\); install it with: "
        r"python -m pip install -e '\.\[timm\]'$",
        skeleton_of[0],
    )
    with pytest.raises(ConfigError, match="needs timm"):
        weights_of("timm:test_convnext2")
    assert not is_of_timm(nn.Linear(2, 2))


def test_only_what_timm_itself_refuses_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"'timm:repvit_m0_9' cannot be built with .*drop_path"):
        build_timm("timm:repvit_m0_9", CLASSES, stochastic_depth=0.5)


def test_a_network_of_timms_is_no_function_of_the_users() -> None:
    assert not is_reference("timm:resnet10t")
    assert is_reference("timmy:resnet10t")


# --- Sizes, costs, identity -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[(name, size) for name in ("test_vit", "levit_128s") for size in ("usual", 64)],
        ("test_maxvit", 64),
        ("efficientformer_l1", "usual"),  # and no other
    ],
)
def test_a_network_for_one_image_size_is_built_for_the_size_asked(
    name: str, size: str | int
) -> None:
    assert timm.get_pretrained_cfg(name).fixed_input_size
    model = f"timm:{name}"
    pixels = usual_preprocessing(model).crop_size if size == "usual" else int(size)
    assert check_image_size(config_of(model), pixels) == []


def test_a_size_that_does_not_fit_is_refused_with_one_that_does() -> None:
    (mistake,) = check_image_size(config_of("timm:test_vit"), 8)
    assert "cannot take images of 8 x 8 pixels" in mistake
    assert "--image-size 32" in mistake


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_mambaout", "levit_128s"])
def test_show_counts_parameters_and_operations_as_timms_network_has_them(name: str) -> None:
    anatomy = read_anatomy(f"timm:{name}")
    size = timm.get_pretrained_cfg(name).input_size[-1]
    theirs = timm.create_model(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(1, 3, size, size))
    assert anatomy.image_size == size
    assert anatomy.parameters == sum(p.numel() for p in theirs.parameters())
    assert anatomy.flops == counter.get_total_flops()
    assert [s.name for s in anatomy.stages] == [
        s.name for s in StagedModel(theirs, find_timm(f"timm:{name}")).stages
    ]
    assert all(stage.flops > 0 for stage in anatomy.stages)
    assert anatomy.stages[-1].output == (1000,)


def test_what_can_be_told_apart_of_two_configurations_is_told_apart() -> None:
    config = config_of("timm:resnet10t", freeze_depth=5, lr_ratio=0.5)
    assert effective(config)["lrs"] == {"head": 0.1}
    assert config_hash(config) == config_hash(replace(config, freeze_depth=-1, lr_ratio=0.1))
    others = [
        replace(config, model="timm:resnet18d"),
        replace(config, model="resnet18"),
        replace(config, freeze_depth=4),
        replace(config, stochastic_depth=0.1),
    ]
    assert len({config_hash(c) for c in (config, *others)}) == 5


def test_a_staged_network_and_its_family_can_be_pickled() -> None:
    staged = built("test_vit").eval()
    copy = pickle.loads(pickle.dumps(staged))  # noqa: S301 - our own bytes
    with torch.no_grad():
        assert torch.equal(copy(images_for("test_vit")), staged(images_for("test_vit")))
    family = pickle.loads(pickle.dumps(find_timm("timm:test_vit")))  # noqa: S301 - likewise
    assert list(family.stages(staged.network)) == [stage.name for stage in staged.stages]


# --- Weights: which -------------------------------------------------------------------------------


def test_the_weights_are_those_that_timm_lists_by_tag() -> None:
    found = weights_of("timm:resnet50d")
    listed = {full.split(".")[1] for full in timm.list_models("resnet50d.*", pretrained=True)}
    assert found.keys() == listed | {"DEFAULT"}
    assert found["DEFAULT"].name == f"resnet50d.{timm.get_pretrained_cfg('resnet50d').tag}"
    assert found["DEFAULT"] == found["ra2_in1k"]
    assert found["a1_in1k"].name == "resnet50d.a1_in1k"
    assert found["a1_in1k"].url.endswith("/timm/resnet50d.a1_in1k/resolve/main/model.safetensors")


def test_weights_outside_of_the_hub_keep_their_own_name_and_so_their_hash() -> None:
    found = weights_of("timm:legacy_seresnet18")["in1k"]
    assert found.url.startswith("https://github.com/")
    assert found.file_name == "seresnet18-4bb0ce65.pth"
    assert found.cached is None


def test_no_two_files_of_timms_have_one_name_in_the_cache() -> None:
    urls: dict[str, set[str]] = {}
    for name in timm.list_models():
        found = weights_of(f"timm:{name}")
        if found:
            default = timm.get_pretrained_cfg(name)
            assert found["DEFAULT"] == found[default.tag or "untagged"]
        for weights in found.values():
            urls.setdefault(weights.file_name, set()).add(weights.url)
            assert "/" not in weights.file_name
            pixels = weights.preprocessing
            assert len(pixels.mean) == len(pixels.std) == 3
            assert pixels.resize_size >= pixels.crop_size > 0
    assert len(urls) > 1500
    assert [name for name, places in urls.items() if len(places) > 1] == []


@pytest.mark.parametrize(
    ("model", "asked", "mode"),
    [
        ("mobilenetv4_conv_small", "DEFAULT", "center"),
        ("coat_lite_medium_384", "in1k", "squash"),
        ("resnet50", "a1_in1k", "center"),
    ],
)
def test_weights_whose_images_timm_does_not_crop_are_warned_of(
    model: str, asked: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(f"timm:{model}")[asked]
    assert weights.crop_mode == timm.get_pretrained_cfg(weights.name).crop_mode == mode
    monkeypatch.setattr("tuneapp.weights.cached_or_fetched", lambda *_: tmp_path / "w")
    (tmp_path / "w").write_bytes(b"weights")
    for name in (asked, weights.name):
        found = find_weights(f"timm:{model}", name)
        assert found.name == weights.name
        assert found.warning == (
            ""
            if mode == "center"
            else f"timm evaluates {weights.name} with crop_mode={mode!r}, on the whole image; "
            "tuneapp crops the centre, so the edges of an image that is not square are not seen"
        )
    # Random weights of the same network were evaluated with nothing.
    assert find_weights(f"timm:{model}", None).warning == ""


def test_every_crop_mode_of_timms_is_one_that_is_known() -> None:
    modes = {w.crop_mode for n in timm.list_models() for w in weights_of(f"timm:{n}").values()}
    assert {"center", "squash"} <= modes <= {"center", "squash", "border"}


@pytest.mark.parametrize(
    ("model", "asked", "told"),
    [
        ("timm:resnet50d", "a1_in1q", "of timm:resnet50d are unknown; did you mean 'a1_in1k'"),
        ("timm:test_vit", "IMAGENET1K_V1", "known: r160_in1k, DEFAULT, 'auto'"),
        ("timm:convnext_zepto_rms_ols", "nothing.here", "no such file or folder"),
    ],
)
def test_unknown_weights_are_refused_by_name(model: str, asked: str, told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        find_weights(model, asked)


def without_weights() -> str:
    return next(f"timm:{n}" for n in timm.list_models("resnet*") if not weights_of(f"timm:{n}"))


def test_a_network_without_weights_of_timms_starts_from_random_ones_unless_asked_by_name() -> None:
    model = without_weights()
    found = find_weights(model, "auto")
    assert (found.file, found.name, found.warning) == (None, "random", "")
    with pytest.raises(WeightsError, match=r"timm has none for .*; give None or 'auto'"):
        find_weights(model, "DEFAULT")


# --- Weights: from a server that stands in for the Hub, and from the Hub's own cache --------------

FIND = """
import json, sys
from tuneapp.errors import WeightsError
from tuneapp.weights import find_weights

for model, asked in json.loads(sys.argv[1]):
    try:
        print(json.dumps(find_weights(model, asked).as_dict()))
    except WeightsError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A real server: its address, the folder that it serves, and what it was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=partial(http.serve_forever, poll_interval=0.02))
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", folder, asked
        http.shutdown()
        thread.join()


def find_in_a_new_process(
    endpoint: str, home: Path, *asked: tuple[str, str]
) -> list[dict[str, Any] | str]:
    """Find weights where huggingface_hub reads its settings, which it does when it is imported."""
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home / "torch")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    done = subprocess.run(
        [sys.executable, "-c", FIND, json.dumps(asked)],
        env={**kept, **own, "no_proxy": "*"},
        text=True,
        capture_output=True,
        timeout=50,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_weights_are_fetched_once_from_the_hub_or_taken_from_its_cache(
    hub: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    endpoint, folder, requests = hub
    name = "test_resnet.r160_in1k"
    (folder / "timm" / name / "resolve" / "main").mkdir(parents=True)
    torch.manual_seed(4)
    state = timm.create_model("test_resnet").state_dict()
    served = saved(state, folder / "timm" / name / "resolve" / "main" / "model.safetensors")

    # The folders of the Hub's cache, as `hf download timm/test_vit.r160_in1k` leaves them.
    repository = tmp_path / "hf" / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / "0123abcd"
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    vit = timm.create_model("test_vit").state_dict()
    saved(vit, repository / "blobs" / "x.safetensors").rename(repository / "blobs" / "deadbeef")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/deadbeef"))

    tag, default, auto, cached, nowhere, random = find_in_a_new_process(
        endpoint,
        tmp_path,
        ("timm:test_resnet", "r160_in1k"),
        ("timm:test_resnet", "DEFAULT"),
        ("timm:test_resnet", "auto"),
        ("timm:test_vit", "auto"),
        ("timm:test_nfnet", "DEFAULT"),
        ("timm:test_nfnet", "auto"),
    )
    put = tmp_path / "torch/hub/checkpoints/timm--test_resnet.r160_in1k--model.safetensors"
    for asked, found in {"r160_in1k": tag, "DEFAULT": default, "auto": auto}.items():
        assert isinstance(found, dict)
        assert (found["asked"], found["file"], found["name"]) == (asked, str(put), name)
        assert found["warning"] == ""
    assert put.read_bytes() == served.read_bytes()
    assert requests.count(f"/timm/{name}/resolve/main/model.safetensors") == 1

    assert isinstance(cached, dict)
    assert cached["name"] == "test_vit.r160_in1k"
    assert cached["file"] == str(snapshot / "model.safetensors")
    assert not [path for path in requests if "test_vit" in path]
    network = build_timm("timm:test_vit", CLASSES)
    report = load_weights(network, config_of("timm:test_vit"), Path(cached["file"]))
    assert set(report.other_shape) == {"head.weight", "head.bias"}

    where = tmp_path / "torch/hub/checkpoints/timm--test_nfnet.r160_in1k--model.safetensors"
    assert isinstance(nowhere, str)
    assert endpoint in nowhere
    assert nowhere.endswith(f"put the file at {where}")
    assert isinstance(random, dict)
    assert (random["file"], random["name"]) == (None, "random")
    assert "timm:test_nfnet starts from RANDOM weights" in random["warning"]


# --- Weights: what fits ---------------------------------------------------------------------------


def filled(network: nn.Module) -> dict[str, Tensor]:
    """Other numbers in every tensor of a network."""
    generator = torch.Generator().manual_seed(8)
    return {
        name: torch.rand(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize(
    "name",
    ["resnet10t", "test_convnext", "test_vit", "test_maxvit", "levit_128s", "test_efficientnet"],
)
def test_all_but_the_classifier_is_loaded_from_a_file_of_a_thousand_classes(
    name: str, tmp_path: Path
) -> None:
    state = filled(timm.create_model(name))
    file = saved(state, tmp_path / "model.safetensors")
    network = build_timm(f"timm:{name}", 10)
    fresh = {n: t.clone() for n, t in network.state_dict().items()}
    report = load_weights(network, config_of(f"timm:{name}"), file)
    heads = tuple(f"{head}." for head in find_timm(f"timm:{name}").heads)
    new = {n for n in state if n.startswith(heads)}
    assert set(report.other_shape) == new
    assert set(report.loaded) == fresh.keys() - new
    assert (report.missing, report.unexpected) == ((), ())
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, fresh[key] if key in new else state[key]), key


# timm's own interpolation of the tables of relative positions.
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize("name", ["test_vit", "test_maxvit", "test_vit_relpos", "test_coatnet"])
def test_weights_for_another_image_size_become_what_timm_makes_of_them(
    name: str, tmp_path: Path
) -> None:
    usual = timm.create_model(name)
    state = filled(usual)
    file = saved(state, tmp_path / "model.safetensors")
    network = build_timm(f"timm:{name}", 10, 96)
    report = load_weights(network, config_of(f"timm:{name}"), file)
    theirs = timm.create_model(
        name,
        pretrained=True,
        num_classes=10,
        img_size=96,
        pretrained_cfg_overlay={"file": str(file)},
    )
    heads = tuple(f"{head}." for head in find_timm(f"timm:{name}").heads)
    wanted = {n: t for n, t in theirs.state_dict().items() if not n.startswith(heads)}
    ours = network.state_dict()
    assert [n for n, tensor in wanted.items() if not torch.equal(ours[n], tensor)] == []
    assert wanted.keys() <= set(report.loaded)
    resized = {n for n in wanted if wanted[n].shape != state[n].shape}
    assert set(report.interpolated) == resized
    assert bool(resized) == (name != "test_vit_relpos")  # whose positions are a function
    assert ("interpolated for another image size" in str(report)) == bool(resized)


def test_position_embeddings_are_resized_and_not_drawn_anew(tmp_path: Path) -> None:
    state = filled(timm.create_model("test_vit"))
    network = build_timm("timm:test_vit", 10, 96)
    assert network.pos_embed.shape != state["pos_embed"].shape
    file = saved(state, tmp_path / "model.safetensors")
    report = load_weights(network, config_of("timm:test_vit"), file)
    assert "pos_embed" in report.loaded
    # Of numbers in [0, 1], whose mean stays what it was; new ones would be drawn around 0.
    assert network.pos_embed.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("error")
def test_a_warning_of_timms_interpolation_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = build_timm("timm:test_vit", 10, 96)
    module = sys.modules[type(network).__module__]
    adapt = module.checkpoint_filter_fn

    def warning(*args: Any) -> Any:
        warnings.warn("searchsorted", UserWarning, stacklevel=1)
        return adapt(*args)

    monkeypatch.setattr(module, "checkpoint_filter_fn", warning)
    state = filled(timm.create_model("test_vit"))
    file = saved(state, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "tuneapp"):
        report = load_weights(network, config_of("timm:test_vit"), file)
    assert "timm's checkpoint filter: searchsorted" in caplog.messages
    assert report.interpolated == ("pos_embed",)


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), MemoryError(), OSError("disk")])
def test_only_what_a_foreign_file_can_cause_is_taken_for_a_foreign_file(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = build_timm("timm:test_vit", 10)

    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", fail)
    state = filled(network)
    if isinstance(error, KeyError | AssertionError):
        with caplog.at_level(logging.INFO, "tuneapp"):
            assert translated(network, state) is state
        assert f"timm's checkpoint filter: {type(error).__name__}" in caplog.text
    else:
        with pytest.raises(type(error)):
            translated(network, state)


def test_a_head_for_distillation_that_timm_does_not_name_is_head(tmp_path: Path) -> None:
    assert timm.get_pretrained_cfg("levit_384_s8").classifier == "head.linear"
    staged = skeleton("timm:levit_384_s8")
    linear = {"head.linear.weight", "head.linear.bias"}
    linear |= {name.replace("head.", "head_dist.") for name in linear}
    assert names_in(staged, "head") == linear
    file = saved(filled(timm.create_model("levit_384_s8")), tmp_path / "w.safetensors")
    network = build_timm("timm:levit_384_s8", 10)
    report = load_weights(network, config_of("timm:levit_384_s8"), file)
    assert set(report.other_shape) == linear


def facebooks(name: str) -> str:
    """What the authors of ConvNeXt call a tensor of timm's."""
    name = re.sub(r"stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name)
    name = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
    return name.replace("head.norm.", "norm.").replace("head.fc.", "head.")


def test_a_file_with_its_authors_names_is_understood_as_timm_understands_it(
    tmp_path: Path,
) -> None:
    state = filled(timm.create_model("convnext_atto"))
    file = saved({"model": {facebooks(n): t for n, t in state.items()}}, tmp_path / "theirs.pth")
    network = build_timm("timm:convnext_atto", 10)
    report = load_weights(network, config_of("timm:convnext_atto"), file)
    assert report.unexpected == report.missing == ()
    own = network.state_dict()
    assert all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith("head.fc."))


@pytest.mark.parametrize("other", ["resnet10t", "test_convnext", "test_vit2"])
def test_a_file_of_another_network_is_refused_and_changes_nothing(
    other: str, tmp_path: Path
) -> None:
    file = saved(timm.create_model(other).state_dict(), tmp_path / "model.safetensors")
    network = build_timm("timm:test_vit", 10)
    before = {n: t.clone() for n, t in network.state_dict().items()}
    with pytest.raises(WeightsError, match="belongs to another network"):
        load_weights(network, config_of("timm:test_vit"), file)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


# --- Preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("resnet10t", "c3_in1k"),
        ("resnet10t", None),
        ("test_resnet", "auto"),  # bilinear
        ("xcit_nano_12_p16_224", "DEFAULT"),  # nothing is cropped away
        ("vit_tiny_patch16_224", "augreg_in21k"),  # mean and std of one half
        ("vit_tiny_patch16_384", "DEFAULT"),  # another size
    ],
)
def test_images_are_prepared_as_timm_prepares_them_to_evaluate(
    model: str, asked: str | None, images: ImageSet, run: TrialRun
) -> None:
    tag = f"{model}.{asked}" if asked not in (None, "auto", "DEFAULT") else model
    cfg = timm.get_pretrained_cfg(tag)
    assert cfg.crop_mode == "center"
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg.to_dict()))
    assert images.root is not None
    wanted = torch.stack(
        [
            transform(Image.open(images.root / example.path).convert("RGB"))
            for example in images.of("val")
        ]
    )
    config = config_of(f"timm:{model}", weights=asked)
    got = torch.cat([x for x, _ in batches_of(config, run, "val").epoch(1)])
    assert got.shape == wanted.shape
    # Of the same 8-bit pixels; timm subtracts and divides, and so do we, in another order.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_the_preprocessing_is_that_of_the_weights_named_and_not_of_the_default_ones() -> None:
    default = preprocessing_of(config_of("timm:resnet50d", weights="DEFAULT"), None)
    named = preprocessing_of(config_of("timm:resnet50d", weights="a1_in1k"), None)
    usual = usual_preprocessing("timm:resnet50d")
    assert default == usual
    assert preprocessing_of(config_of("timm:resnet50d", weights=None), None) == usual
    assert (default.crop_size, default.resize_size) != (named.crop_size, named.resize_size)
    cfg = timm.get_pretrained_cfg("resnet50d.a1_in1k")
    assert (named.crop_size, named.resize_size) == (
        cfg.input_size[-1],
        int(cfg.input_size[-1] / cfg.crop_pct),
    )


# --- A trial --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_an_interrupted_trial_goes_on_to_the_same_bits(
    name: str, config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(
        config,
        model=f"timm:{name}",
        optimizer=Sgd(lr=0.02, momentum=0.9),
        schedule=Constant(),
        freeze_depth=2,
        unfreeze_at={2: 0},
        lr_ratio=0.5,
        dropout=0.2,
        stochastic_depth=0.3,
        augment="standard",
    )
    rows = require_exact_resume(config, run, tmp_path, 1)
    assert [len(row["applied"]["lr"]) for row in rows] == [4, 6]
    assert rows[0]["applied"]["dropout"] == (0.2,)
    assert rows[0]["applied"]["stochastic_depth"] == 0.3


def test_a_trial_starts_from_the_weights_of_a_file(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    state = filled(timm.create_model("test_convnext"))
    file = saved(state, tmp_path / "model.safetensors")
    config = replace(config, model="timm:test_convnext", weights=str(file), freeze_depth=-1)
    training = begin_training(config, replace(run, weights_file=file, weights_name="file"))
    own = training.state.model.network.state_dict()
    assert all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith("head.fc."))


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nearly_all_of_timms_networks_have_stages_that_hold_each_parameter_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused: dict[str, str] = {}
    names = timm.list_models()
    for name in names:
        model = f"timm:{name}"
        try:
            with torch.device("meta"):
                staged = StagedModel(build_timm(model, 10), find_timm(model))
        except ConfigError as error:
            refused[name] = str(error)
            continue
        own = [id(p) for p in staged.network.parameters()]
        held = [id(p) for stage in staged.stages for p in stage.parameters()]
        assert sorted(held) == sorted(own), name
        stages = [stage.name for stage in staged.stages]
        assert (stages[0], stages[-1]) == ("stem", "head"), name
        assert len(set(stages)) == len(stages) >= 2, name
        assert all(stage.parameters() for stage in staged.stages), name
    with capsys.disabled():
        sys.stdout.write(f"\n{len(refused)} of {len(names)} are refused: {', '.join(refused)}\n")
    assert len(refused) <= 0.03 * len(names), refused
    assert all("return it from a function of your own" in told for told in refused.values())
