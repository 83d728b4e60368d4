"""Published detectors by name: where their files are, and what is published about them.

Sources: the tables of facebookresearch/detr `README.md` and of fundamentalvision/Deformable-DETR `README.md`. The
latter's files lie on Google Drive, without a hash, behind a page that a person has to confirm: they are named here with
that page, and taken as local files.
"""

from dataclasses import dataclass

_DETR = "https://dl.fbaipublicfiles.com/detr"
_DRIVE = "https://drive.google.com/file/d"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published detector.

    Attributes:
        network: its backbone, as `detector.backbone.name` names it.
        url: of the file, whose name carries the first digits of its SHA-256; None where there is only `page`.
        page: where a person can download the file by hand; "" where `url` will do.
        size: of the file in megabytes, as published; None where it is not published.
        box_ap: published AP on COCO val2017, in percent.
        config: the recipe in `configs/` for it.
        options: of the command line, where the recipe needs some to become its own.
        dilation: its backbone is dilated (DC5), which its keys do not show.
    """

    network: str
    box_ap: float
    config: str
    url: str | None = None
    page: str = ""
    size: int | None = None
    options: tuple[str, ...] = ()
    dilation: bool = False


_DILATED = ("--detector.backbone.dilation", "true")
_SINGLE_SCALE = ("--detector.num_feature_levels", "1", "--detector.backbone.return_layers", "[layer4]")

ZOO = {
    "detr_r50": Published(
        network="resnet50", box_ap=42.0, url=f"{_DETR}/detr-r50-e632da11.pth", size=159, config="detr_r50.yaml"
    ),
    "detr_r50_dc5": Published(
        network="resnet50",
        box_ap=43.3,
        url=f"{_DETR}/detr-r50-dc5-f0fb7ef5.pth",
        size=159,
        config="detr_r50_dc5.yaml",
        dilation=True,
    ),
    "detr_r101": Published(
        network="resnet101", box_ap=43.5, url=f"{_DETR}/detr-r101-2c7b67e5.pth", size=232, config="detr_r101.yaml"
    ),
    "detr_r101_dc5": Published(
        network="resnet101",
        box_ap=44.9,
        url=f"{_DETR}/detr-r101-dc5-a2e86def.pth",
        size=232,
        config="detr_r101.yaml",
        options=_DILATED,
        dilation=True,
    ),
    "detr_r50_panoptic": Published(
        network="resnet50",
        box_ap=38.8,
        url=f"{_DETR}/detr-r50-panoptic-00ce5173.pth",
        size=165,
        config="detr_r50.yaml",
    ),
    "detr_r50_dc5_panoptic": Published(
        network="resnet50",
        box_ap=40.2,
        url=f"{_DETR}/detr-r50-dc5-panoptic-da08f1b1.pth",
        size=165,
        config="detr_r50_dc5.yaml",
        dilation=True,
    ),
    "detr_r101_panoptic": Published(
        network="resnet101",
        box_ap=40.1,
        url=f"{_DETR}/detr-r101-panoptic-40021d53.pth",
        size=237,
        config="detr_r101.yaml",
    ),
    "deformable_detr_r50_single_scale": Published(
        network="resnet50",
        box_ap=39.4,
        page=f"{_DRIVE}/1WEjQ9_FgfI5sw5OZZ4ix-OKk-IJ_-SDU/view",
        config="deformable_detr_r50.yaml",
        options=_SINGLE_SCALE,
    ),
    "deformable_detr_r50_single_scale_dc5": Published(
        network="resnet50",
        box_ap=41.5,
        page=f"{_DRIVE}/1m_TgMjzH7D44fbA-c_jiBZ-xf-odxGdk/view",
        config="deformable_detr_r50.yaml",
        options=(*_SINGLE_SCALE, *_DILATED),
        dilation=True,
    ),
    "deformable_detr_r50": Published(
        network="resnet50",
        box_ap=44.5,
        page=f"{_DRIVE}/1nDWZWHuRwtwGden77NLM9JoWe-YisJnA/view",
        config="deformable_detr_r50.yaml",
    ),
    "deformable_detr_r50_refine": Published(
        network="resnet50",
        box_ap=46.2,
        page=f"{_DRIVE}/1JYKyRYzUH7uo9eVfDaVCiaIGZb5YTCuI/view",
        config="deformable_detr_r50_refine.yaml",
    ),
    "deformable_detr_r50_two_stage": Published(
        network="resnet50",
        box_ap=46.9,
        page=f"{_DRIVE}/15I03A7hNTpwuLNdfuEmW9_taZMNVssEp/view",
        config="deformable_detr_r50_two_stage.yaml",
    ),
}
