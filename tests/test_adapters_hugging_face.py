"""Detectors of transformers on our backbone compute and train as on their own, where transformers is installed.

It is too large for every test run; `pytest -rP tests/test_adapters_hugging_face.py` shows the differences.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_backbone import Backbone, FrozenBatchNorm2d, fold_for_inference
from detr_backbone.adapters.hugging_face import ConvEncoder, replace_backbone
from detr_backbone.errors import ConfigError
from tests.processes import ROOT

transformers = pytest.importorskip("transformers", reason="80 MB with its tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

LAYERS = {
    f"{which}_{what}": n
    for which in ("encoder", "decoder")
    for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))
}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
QUERIES = {"num_queries": 7, "num_labels": 5, **NO_DROPOUT}
TIMM = {"backbone": "resnet18", "use_timm_backbone": True, "use_pretrained_backbone": False}
STAGES = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def native(levels: int, kind: str = "ResNetConfig") -> Any:
    return getattr(transformers, kind)(**STAGES, out_features=[f"stage{n}" for n in range(5 - levels, 5)])


def hgnet() -> Any:
    stages = {"stage_in_channels": [16, 16, 32, 64], "stage_mid_channels": [16] * 4, "stage_num_blocks": [1] * 4}
    sizes = {"stage_out_channels": [16, 32, 64, 128], "stage_numb_of_layers": [1] * 4, "stem_channels": [3, 16, 16]}
    return transformers.HGNetV2Config(
        **stages, **sizes, hidden_sizes=[16, 32, 64, 128], out_features=["stage2", "stage3", "stage4"]
    )


def rt_detr(kind: str, **options: Any) -> Any:
    sizes = {"encoder_in_channels": [32, 64, 128], "feat_strides": [8, 16, 32], "decoder_in_channels": [32] * 3}
    common = {"encoder_hidden_dim": 32, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **sizes}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2, "num_denoising": 0}
    return getattr(transformers, kind)(**common, **heads, **QUERIES, hidden_expansion=1.0, **options)


CONFIGS = {
    "Detr": lambda: transformers.DetrConfig(**LAYERS, **QUERIES, **TIMM, d_model=32),
    "Detr native": lambda: transformers.DetrConfig(**LAYERS, **QUERIES, d_model=32, backbone_config=native(4)),
    "ConditionalDetr": lambda: transformers.ConditionalDetrConfig(**LAYERS, **QUERIES, **TIMM, d_model=32),
    "DabDetr": lambda: transformers.DabDetrConfig(**LAYERS, **QUERIES, **TIMM, hidden_size=32),
    "DeformableDetr": lambda: transformers.DeformableDetrConfig(**LAYERS, **QUERIES, **TIMM, d_model=32),
    "DeformableDetr native": lambda: transformers.DeformableDetrConfig(
        **LAYERS, **QUERIES, d_model=32, backbone_config=native(3)
    ),
    "DFine": lambda: rt_detr("DFineConfig", backbone_config=hgnet()),
    "RTDetr": lambda: rt_detr("RTDetrConfig", backbone_config=native(3, "RTDetrResNetConfig")),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.split(maxsplit=1)[0]}ForObjectDetection")(CONFIGS[name]())
    for key, parameter in model.named_parameters():
        if "backbone" in key and parameter.dim() == 4:  # some start so small that the images hardly show behind them
            nn.init.kaiming_normal_(parameter)
    for key, buffer in model.named_buffers():
        if "backbone" not in key:
            continue
        if key.endswith(("running_mean", "bias")):  # of frozen BatchNorm: what fresh statistics would not show
            nn.init.normal_(buffer, std=0.1)
        elif key.endswith("weight"):  # timm starts the last one of a block at zero
            nn.init.constant_(buffer, 0.7)
    return model


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, 64:] = mask[1, :, 100:] = 0
    images = torch.randn(2, 3, 96, 128, generator=generator) * mask[:, None]
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.4, 0.3, 0.1]])
    labels = [{"class_labels": torch.tensor([index, 3]), "boxes": boxes} for index in range(2)]
    return {"pixel_values": images, "pixel_mask": mask, "labels": labels}


def training_step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.train().zero_grad()
    torch.manual_seed(2)
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of transformers, and a copy of it on our backbone."""
    theirs = model_of(request.param)
    return theirs, replace_backbone(copy.deepcopy(theirs), padding="zeros")


def test_a_training_step_has_the_loss_and_the_gradients_of_their_own_backbone(models: tuple[Any, Any]) -> None:
    theirs, ours = models
    loss, gradients = training_step(ours)
    expected, expected_gradients = training_step(theirs)

    print(f"{type(ours).__name__}: loss {expected:.4f}, difference {abs(loss - expected):.1e}")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    norm, expected_norm = (
        torch.stack([g.norm() for g in each.values()]).norm() for each in (gradients, expected_gradients)
    )
    torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=0)


def test_names_order_and_what_trains_are_those_of_their_own_backbone(models: tuple[Any, Any]) -> None:
    theirs, ours = models

    assert list(ours.state_dict()) == list(theirs.state_dict())
    flags = [{key: p.requires_grad for key, p in model.named_parameters()} for model in models]
    assert list(flags[0].items()) == list(flags[1].items())


def test_norms_are_those_that_our_backbone_folds(models: tuple[Any, Any]) -> None:
    norms = [module for module in models[1].model.backbone.modules() if "FrozenBatchNorm" in type(module).__name__]

    assert len(norms) >= 10
    assert all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)


@torch.no_grad()
def test_what_our_model_saves_their_class_reads(models: tuple[Any, Any], tmp_path: Path) -> None:
    _, ours = models
    ours.eval().save_pretrained(tmp_path)
    loaded, info = type(ours).from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values())
    images = {key: value for key, value in batch().items() if key != "labels"}
    expected, outputs = loaded.eval()(**images), ours(**images)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_copy_of_our_model_has_a_backbone_of_its_own(models: tuple[Any, Any]) -> None:
    images = {key: value for key, value in batch().items() if key != "labels"}
    ours = models[1].eval()
    twin = copy.deepcopy(ours)
    expected = ours(**images).logits
    torch.testing.assert_close(twin(**images).logits, expected, rtol=0, atol=0)

    twin.load_state_dict({key: tensor * 0.5 for key, tensor in twin.state_dict().items()})
    assert not torch.equal(twin(**images).logits, expected)
    torch.testing.assert_close(ours(**images).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_our_model_is_folded_for_inference(models: tuple[Any, Any]) -> None:
    images = {key: value for key, value in batch().items() if key != "labels"}
    ours = copy.deepcopy(models[1]).eval()
    expected = ours(**images)
    outputs = fold_for_inference(ours)(**images)

    assert not any(isinstance(module, FrozenBatchNorm2d) for module in ours.modules())
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="folded for inference does not train"):
        ours.train()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Detr", "Detr native", "ConditionalDetr", "DabDetr"])
def test_an_image_gives_the_same_alone_and_in_a_padded_batch(name: str) -> None:
    images = {key: value for key, value in batch().items() if key != "labels"}
    alone = {key: value[1:, ..., :64, :100] for key, value in images.items()}
    differences = {}
    theirs = model_of(name).eval()
    for which, model in (("theirs", theirs), ("ours", replace_backbone(copy.deepcopy(theirs)))):
        together = model(**images).logits[1]
        differences[which] = (together - model(**alone).logits[0]).abs().max().item()

    print(f"{name}: logits alone and in a batch differ by {differences['theirs']:.1e}, on our backbone by", end=" ")
    print(f"{differences['ours']:.1e}")
    assert differences["ours"] < 1e-5
    assert differences["theirs"] > 10 * differences["ours"]


@torch.no_grad()
def test_another_network_takes_the_place_of_their_own() -> None:
    theirs = model_of("Detr").eval()
    backbone = Backbone("resnet18", return_layers=["layer4"], padding="zeros")
    ours = replace_backbone(copy.deepcopy(theirs), backbone)

    assert isinstance(ours.model.backbone, ConvEncoder)
    assert ours.model.backbone.backbone is backbone
    ours.load_state_dict(theirs.state_dict())  # torchvision and timm have the same names
    images = {key: value for key, value in batch().items() if key != "labels"}
    torch.testing.assert_close(ours(**images).logits, theirs(**images).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("page", ["README.md", "docs/adapters.md"])
def test_the_lines_of_the_page_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from transformers.*?)```", text, re.DOTALL)
    monkeypatch.setattr(transformers.DetrForObjectDetection, "from_pretrained", lambda _: model_of("Detr"))
    monkeypatch.chdir(tmp_path)
    names = batch()
    exec(lines, names)

    assert isinstance(names["model"].model.backbone, ConvEncoder)
    assert names["outputs"].loss.isfinite()
    assert ("save_pretrained" in lines) == (tmp_path / "mine" / "model.safetensors").is_file()
    assert len(lines.splitlines()) <= 10


def test_levels_that_the_model_cannot_read_are_refused() -> None:
    for name, layers in (("DeformableDetr", ["layer4"]), ("Detr", ["layer3"])):
        backbone = Backbone("resnet18", return_layers=layers, train_layers=())
        with pytest.raises(ConfigError, match=rf"`backbone` must have levels.*512\].* got \[{backbone.num_channels}\]"):
            replace_backbone(model_of(name), backbone)


def test_a_backbone_is_not_replaced_by_itself() -> None:
    with pytest.raises(ConfigError, match="`backbone` must be given for a model on a backbone of this package"):
        replace_backbone(replace_backbone(model_of("Detr native"), padding="zeros"))


def test_a_model_without_such_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`model` must be of transformers.* got Linear with 0"):
        replace_backbone(nn.Linear(1, 1))
