"""`detr-backbone convert-data`."""

from detr_backbone.coco.check import check_split
from detr_backbone.coco.check_report import DataReport
from detr_backbone.coco.conversion import DatasetLayout, convert_dataset
from detr_backbone.coco.findings import DEFAULT_POLICIES, DataPolicies
from detr_backbone.commands.command_line import Command, output_file


def main(
    *,
    layout: DatasetLayout,
    folder: str,
    output: str,
    split: str | None = None,
    images: str | None = None,
    policies: DataPolicies = DEFAULT_POLICIES,
) -> int:
    """Convert a dataset to one COCO file with a manifest, and check it; the exit code is 2 if training would refuse it.

    Args:
        layout: of the dataset.
        folder: with data.yaml (yolo), Annotations or XML files (voc), or annotations.xml (cvat).
        output: the JSON file to write.
        split: of a YOLO dataset, a key of data.yaml, train if left out; of a VOC dataset, a list in ImageSets/Main
            or a folder, all images if left out. The categories are those of all splits.
        images: the folder of the image files, if it is not that of the layout.
        policies: how faults are handled that need not be refused.
    """
    output_file(output)
    manifest = convert_dataset(folder, output, layout, split=split, images=images)
    for remark in manifest["remarks"]:
        print(remark)
    print(f"images: {manifest['images']}\nannotations: {output}\n")
    checked = check_split(manifest["images"], output)
    report = DataReport(splits=[checked], policies=policies, segmentations=False)
    print(report.table())
    return 2 if report.count("error") else 0


COMMAND = Command(
    name="detr-backbone convert-data",
    main=main,
    example="detr-backbone convert-data --layout yolo --folder mine --output mine/train.json",
)
