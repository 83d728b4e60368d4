"""The findings about a dataset as a table to read, and as plain dicts for a file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from detr_backbone.coco.findings import KINDS, DataPolicies, Findings, Severity, fix_of

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_DONE = {"drop": "; dropped", "clamp": "; clipped", "crowd": "; taken as crowds"}
_SHOWN = 3  # examples in the table; the JSON report has all of them


@dataclass(frozen=True, kw_only=True)
class CheckedSplit:
    """The findings about one annotation file and its image files.

    Attributes:
        name: of the split, in the report.
        annotations: the annotation file.
        num_images: entries of its list of images.
        num_annotations: entries of its list of annotations.
        categories: category id -> name.
        findings: one entry for each kind of fault.
        image_paths: digest of the bytes of each image file that was read -> its path.
        folder: of the image files.
        unlisted: image files in it that the annotation file does not name.
    """

    name: str
    annotations: str
    num_images: int
    num_annotations: int
    categories: Mapping[int, str]
    findings: Sequence[Findings]
    image_paths: Mapping[bytes, str]
    folder: str
    unlisted: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The findings about the splits of a dataset.

    Attributes:
        splits: the checked splits.
        policies: how loading would handle them.
        segmentations: whether segmentations will be used; their faults are errors only then.
    """

    splits: Sequence[CheckedSplit]
    policies: DataPolicies
    segmentations: bool

    def severity(self, kind: str) -> Severity:
        """Return the severity of a kind under the policies: error if loading refuses it, warning if it drops it."""
        if kind.startswith("segmentation_") and not self.segmentations:
            return "note" if kind == "segmentation_missing" else "warning"
        action = self.policies.action(kind)
        return "error" if action == "error" else "warning" if action == "drop" else KINDS[kind].severity

    def count(self, severity: Severity) -> int:
        """Return how many kinds of faults are of this severity, over all splits."""
        return sum(self.severity(one.kind) == severity for _, one in self._sorted())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists, to be written as JSON."""
        return {
            **{f"{severity}s": self.count(severity) for severity in _SEVERITIES},
            "splits": {
                split.name: {
                    "annotations": split.annotations,
                    "num_images": split.num_images,
                    "num_annotations": split.num_annotations,
                    "num_categories": len(split.categories),
                }
                for split in self.splits
            },
            "findings": [
                {
                    "split": split.name,
                    "kind": one.kind,
                    "severity": self.severity(one.kind),
                    "action": self.policies.action(one.kind),
                    "count": one.count,
                    "what": KINDS[one.kind].what,
                    "fix": self._fix(one.kind),
                    "examples": [asdict(example) for example in one.examples],
                }
                for split, one in self._sorted()
            ],
        }

    def table(self) -> str:
        """Return the report as lines of text, the worst first."""
        lines = [
            f"{split.name}: {split.num_images} images, {split.num_annotations} annotations, "
            f"{len(split.categories)} categories in {split.annotations}"
            for split in self.splits
        ]
        indent = " " * 25
        lines.append(f"\n{'severity':8} {'split':6} {'count':>7}  kind" if self._sorted() else "\nno faults")
        for split, one in self._sorted():
            kind = KINDS[one.kind]
            done = _DONE.get(self.policies.action(one.kind), "")
            severity = self.severity(one.kind)
            lines.append(f"{severity:8} {split.name:6} {one.count:7}  {one.kind}: {kind.what}{done}")
            # of files that are missing, every example tells of all
            details = dict.fromkeys(
                example.detail.removeprefix(f"file={split.annotations} ") for example in one.examples
            )
            lines += [indent + detail for detail in list(details)[:_SHOWN]]
            lines += [f"{indent}... {one.count - _SHOWN} more"] if one.count > _SHOWN < len(details) else []
            lines += [f"{indent}fix: {fix}"] if (fix := self._fix(one.kind)) else []
        counts = [(self.count(severity), severity) for severity in _SEVERITIES]
        sums = ", ".join(f"{severity}s of {number} kinds" for number, severity in counts)
        verdict = "training would refuse this dataset" if counts[0][0] else "training takes this dataset"
        return "\n".join([*lines, f"\n{sums}: {verdict}"])

    def _fix(self, kind: str) -> str:
        """Return how to correct a kind; only an error needs a policy."""
        return fix_of(kind) if self.severity(kind) == "error" else KINDS[kind].fix

    def _sorted(self) -> list[tuple[CheckedSplit, Findings]]:
        every = [
            (split, one)
            for split in self.splits
            for one in split.findings
            if not (
                one.kind == "segmentation_missing" and one.count == split.num_annotations and not self.segmentations
            )
        ]
        order = list(KINDS)
        return sorted(every, key=lambda e: (_SEVERITIES.index(self.severity(e[1].kind)), order.index(e[1].kind)))
