"""`detr-backbone inspect`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from detr_backbone import IntermediateLayerGetter, describe, nested_tensor_from_tensor_list
from detr_backbone.coco.images import read_image
from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.commands.command_line import Command, output_folder, require
from detr_backbone.detectors import DETR, DeformableDETR, build_detector, record_attention, record_samples
from detr_backbone.errors import ConfigError
from detr_backbone.prediction import find_images
from detr_backbone.prediction.predictor import model_input
from detr_backbone.training import TrainConfig, detector_of, load_checkpoint, parse_config


@torch.no_grad()
def main(
    *,
    checkpoint: str | None = None,
    config: str | None = None,
    images: list[str] | str | None = None,
    layers: list[str] | int | str = 1,
    limit: int = 2,
    queries: int = 4,
    output: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Describe the layers of a detector, and draw its features, masks, positions and what its queries look at.

    Args:
        checkpoint: the trained detector; its own configuration says what it is.
        config: without a checkpoint, the configuration of a detector that is looked at untrained: a file or a recipe.
        images: a picture, a folder of pictures, or several as [A, B]; drawn shapes if left out.
        layers: a path of named_modules(), several as [A, B], or how deep the table goes; the maps of the paths are
            drawn, or else those of the backbone's levels.
        limit: pictures to take.
        queries: queries to draw for each picture, those of the highest score.
        output: a folder for the table (layers.csv, layers.json) and the drawings; without one, the table is shown only.
        overrides: words that change the configuration.
    """
    if (checkpoint is None) == (config is None):
        raise ConfigError("give --checkpoint or --config")
    for option, value in (("limit", limit), ("queries", queries)):
        if value < 1:
            raise ConfigError(f"`--{option}` must be at least 1, got {value}")
    require("rich", "matplotlib", extra="train")
    folder = None if output is None else output_folder(output)
    pictures = _pictures(images, limit)
    from rich.console import Console

    from detr_backbone.visualize import draw_feature_maps
    from detr_backbone.visualize.fonts import font_warning

    if checkpoint is not None:
        model, settings, names = _trained(checkpoint, overrides)
    else:
        model, settings, names = _untrained(str(config), overrides)
    what = f"{'trained' if names else 'untrained'} {settings.detector.name}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    inputs = [model_input(picture, settings.data.transforms).to(device) for picture in pictures.values()]
    print(f"{what} on {', '.join(pictures)}")
    description = describe(model, inputs, layers=[layers] if isinstance(layers, str) else layers)
    Console(soft_wrap=True).print(description)
    if folder is None:
        return
    (folder / "layers.csv").write_text(description.to_csv(), encoding="utf-8")
    (folder / "layers.json").write_text(json.dumps(description.to_dict(), indent=1), encoding="utf-8")
    drawings = {"levels": _draw_levels(model, inputs)}
    body = model.get_submodule("backbone.0.body")
    assert isinstance(body, IntermediateLayerGetter)
    levels = (f"backbone.0.body.{path}" for path in body.return_layers)
    strides = dict(zip(levels, model.backbone.strides, strict=True))
    if not isinstance(layers, int):
        strides = {row.path: row.stride for row in description.rows if row.stride and not row.output}
    for (name, picture), image in zip(pictures.items(), inputs, strict=True):
        for path, features in _feature_maps(model, image, list(strides)).items():
            title = f"{path} of {what}: {list(features.shape)}, stride {strides[path]}"
            drawings[f"{name}.{path}"] = draw_feature_maps(features, title=title, picture=picture)
        drawings[f"{name}.queries"] = _draw_queries(model, image, picture, names, count=queries, what=what)
    for name, drawing in drawings.items():
        drawing.save(folder / f"{name}.png")
    print(f"{len(drawings)} drawings, layers.csv and layers.json: {folder}")
    if warning := font_warning(names):
        print(warning)


def _trained(path: str, overrides: Sequence[str]) -> tuple[DETR | DeformableDETR, TrainConfig, Sequence[str]]:
    loaded = load_checkpoint(path)
    model, settings = detector_of(loaded, overrides=overrides)
    assert isinstance(model, DETR | DeformableDETR)
    return model, settings, loaded.category_names


def _untrained(path: str, overrides: Sequence[str]) -> tuple[DETR | DeformableDETR, TrainConfig, Sequence[str]]:
    settings = parse_config(["--config", path, *overrides])
    torch.manual_seed(settings.seed)
    model = build_detector(replace(settings.detector, num_classes=settings.detector.num_classes or 1))
    return model.eval(), settings, ()


def _pictures(images: Sequence[str] | str | None, limit: int) -> dict[str, Image.Image]:
    """Return the pictures by the names of their files without endings, which are kept where two would be the same."""
    if images is not None:
        given = [images] if isinstance(images, str) else images
        paths = [found.folder / name for found in map(find_images, given) for name in found.names][:limit]
        stems = Counter(path.stem for path in paths)
        return {path.stem if stems[path.stem] == 1 else path.name: read_image(path) for path in paths}
    with TemporaryDirectory() as folder:
        draw_shapes(Path(folder) / "shapes", train=1, val=limit)
        val = Path(folder) / "shapes" / "val"
        return {f"shapes{Path(name).stem}": read_image(val / name) for name in find_images(val).names}


def _draw_levels(model: DETR | DeformableDETR, images: Sequence[Tensor]) -> Image.Image:
    from detr_backbone.visualize import draw_levels

    first = images[0]
    if len({image.shape for image in images}) == 1:  # nothing would be padded: show a part of it beside it
        images = [first, first[:, : first.shape[1] * 3 // 4, : first.shape[2] // 2]]
    batch = nested_tensor_from_tensor_list(images)
    levels, positions = model.backbone(batch)
    return draw_levels(batch, levels, positions, strides=model.backbone.strides)


def _feature_maps(model: DETR | DeformableDETR, image: Tensor, paths: Sequence[str]) -> dict[str, Tensor]:
    """Maps [C, h, w] of one image, by the layer's path."""
    if not paths:
        return {}
    return {path: output[0] for path, output in IntermediateLayerGetter(model, paths)(image[None]).items()}


def _draw_queries(
    model: DETR | DeformableDETR, image: Tensor, picture: Image.Image, names: Sequence[str], *, count: int, what: str
) -> Image.Image:
    from detr_backbone.visualize import draw_attention, draw_sampling_points

    decoder = model.transformer.decoder
    with record_attention(decoder) as attention, record_samples(decoder) as samples:
        outputs = model([image])
    logits = outputs["pred_logits"][0]
    scores, labels = (logits.softmax(-1)[:, :-1] if isinstance(model, DETR) else logits.sigmoid()).max(-1)
    best = scores.topk(min(count, len(scores))).indices
    boxes = outputs["pred_boxes"][0, best]
    captions = [
        f"query {query}: {names[labels[query]] if names else f'label {labels[query]}'} {scores[query]:.2f}"
        for query in best.tolist()
    ]
    title = f"of {what}\nthe {len(best)} of {len(scores)} queries with the highest scores"
    if isinstance(model, DETR):
        *_, (path, weights) = attention.items()
        height, width = model.backbone([image])[0][-1].tensors.shape[2:]
        return draw_attention(
            picture,
            weights[0, :, best].mean(dim=0).view(-1, height, width),
            boxes=boxes,
            captions=captions,
            title=f"transformer.decoder.{path} {title}, attention to {height} x {width} cells, stride "
            f"{model.backbone.strides[-1]}, mean of {weights.shape[1]} heads",
        )
    *_, (path, looks) = samples.items()
    return draw_sampling_points(
        picture,
        looks.locations[0, best],
        looks.weights[0, best],
        looks.references[0, best],
        boxes=boxes,
        captions=captions,
        strides=model.strides,
        title=f"transformer.decoder.{path} {title}",
    )


COMMAND = Command(
    name="detr-backbone inspect",
    main=main,
    example="detr-backbone inspect --checkpoint runs/shapes/checkpoint.pt --images data/shapes/val --output look\n"
    "detr-backbone inspect --config detr_r50 --layers backbone.0.body.layer3 transformer",
)
