"""One optimiser step: forward, loss and backward of its batches, clipping, update, averaging."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from detr_backbone.coco.dataset import Target
from detr_backbone.detectors import DETR, DeformableDETR, build_criterion, build_detector
from detr_backbone.errors import NumericsError
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.average import WeightAverage
from detr_backbone.training.config import TrainConfig, config_to_dict
from detr_backbone.training.data import Batch
from detr_backbone.training.finite import FailedBatch, first_module_without_finite_output, plain_targets
from detr_backbone.training.inference import without_pretrained
from detr_backbone.training.machine_faults import explain_memory
from detr_backbone.training.optimizer import build_optimizer, build_schedule, clip_gradient
from detr_backbone.training.sampler import seed_step
from detr_backbone.training.sharding import gather, shard

if TYPE_CHECKING:
    from accelerate import Accelerator


class Learner:
    """A detector and what changes it: loss, optimiser, schedule, average.

    Args:
        model: the detector, on its device.
        config: of the run.
        accelerator: computes; wraps the model for autocast and several processes once `prepare` is called.
        steps_per_epoch: optimiser steps of an epoch.
        folder: where a batch is saved whose numbers are not finite.

    Attributes:
        model: the detector itself, under the published keys.
        optimizer, schedule: of the detector.
        average: the averaged detector, where `ema_decay` asks for one.
        is_sharded: whether processes share the detector's tensors (FSDP) instead of holding it whole (DDP).
    """

    def __init__(
        self,
        model: DETR | DeformableDETR,
        config: TrainConfig,
        accelerator: "Accelerator",
        *,
        steps_per_epoch: int,
        folder: Path,
    ) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, config.optimizer)
        self.schedule = build_schedule(self.optimizer, config.optimizer, steps_per_epoch)
        self.average: WeightAverage | None = None
        self._criterion = build_criterion(config.detector).to(accelerator.device)
        self._config, self._accelerator, self._folder = config, accelerator, folder
        self.is_sharded = config.strategy == "fsdp" and accelerator.num_processes > 1

    def evaluated(self) -> nn.Module:
        """Return the detector that is evaluated: the average where there is one; of a sharded one, a whole copy."""
        if self.is_sharded:  # all processes gather together, and then pass different numbers of batches
            whole = build_detector(without_pretrained(self._config.detector)).to(self._accelerator.device)
            whole.load_state_dict(gather(self.model.state_dict()))
            return whole
        return self.model if self.average is None else self.average.module

    def prepare(self, *, step: int, average: Mapping[str, Tensor] | None = None) -> None:
        """Make ready to train: wrap the model, and begin its average or go on with one.

        Args:
            step: optimiser steps that are done.
            average: the state of the average after them.
        """
        # Accelerate wraps the model for autocast and DDP; the loader stays ours, so that a resumed run repeats it.
        self._prepared = self._accelerator.prepare_model(self.model, evaluation_mode=self.is_sharded)
        if self.is_sharded:
            shard(self.model, self.optimizer)
        if self._config.ema_decay:
            self.average = WeightAverage(self.model, self._config.ema_decay, steps=step)
            if average is not None:
                self.average.load(average)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint's tensors: all weights, the two moments of those that train, and their average."""
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        moments = 2 * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        return weights * (2 if self._config.ema_decay else 1) + moments

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the detector and of what changes it; all processes call it together."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if self.is_sharded:
            model, optimizer = gather(model), gather(optimizer)
        return {
            "model": model,
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
        }

    def rate_at(self, step: int) -> float:
        """Return the learning rate of the first group at a step."""
        return float(self.schedule.base_lrs[0] * self.schedule.lr_lambdas[0](step))

    def step(self, batches: Sequence[Batch], step: int) -> list[dict[str, Tensor]]:
        """Take an optimiser step on the mean gradient of some batches, and return the losses of each.

        Args:
            batches: of this process.
            step: number of the step, from 0.

        Raises:
            NumericsError: a loss, an output or the gradient is not finite; names it, the module and the images.
            ResourceError: memory ran out.
        """
        self._prepared.train()
        losses = [
            self._backward(images, targets, step, index, is_last=index == len(batches) - 1, share=1 / len(batches))
            for index, (images, targets) in enumerate(batches)
        ]
        try:
            clip_gradient(self.model, self._config.optimizer.clip_max_norm)
        except NumericsError as error:
            raise self._explained_gradient(error, batches, step) from error
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        return losses

    def _backward(
        self, images: NestedTensor, targets: Sequence[Target], step: int, index: int, *, is_last: bool, share: float
    ) -> dict[str, Tensor]:
        """Add the gradient of a batch; processes exchange theirs with the last batch of a step."""
        seeds = (self._config.seed, step, index, self._accelerator.process_index)
        seed_step(*seeds)
        together = nullcontext() if is_last else self._accelerator.no_sync(self._prepared)
        with explain_memory(images, targets), together:
            moved = images.to(self._accelerator.device, non_blocking=True)
            try:
                losses = self._criterion(self._prepared(moved, targets), targets)
                losses["loss"] = self._criterion.weighted_sum(losses)
            except NumericsError as error:
                if self.is_sharded:  # the other processes are past this forward, and gather nothing more for it
                    raise self._explained(error, step, [targets], "", "train with strategy ddp to see more") from error
                fix = self._save(images, targets, step, index)
                seed_step(*seeds)
                module = first_module_without_finite_output(self.model, moved, targets)
                raise self._explained(error, step, [targets], f"module={module or '-'} ", fix) from error
            self._accelerator.backward(losses["loss"] * share)
        return losses

    def _explained_gradient(self, error: NumericsError, batches: Sequence[Batch], step: int) -> NumericsError:
        """Return an error of a step's gradient that names the batch whose own gradient it is, which is saved.

        All processes look at all their batches: the gradient is that of all, and so is the number of boxes in a loss.
        """
        fix = "lower optimizer.lr, or look at the images"
        if not self.is_sharded:
            finite = [self._has_finite_gradient(*batch, step, index) for index, batch in enumerate(batches)]
            if False in finite:
                index = finite.index(False)
                fix = f"{self._save(*batches[index], step, index)}, {fix}"
                batches = [batches[index]]
        return self._explained(error, step, [targets for _, targets in batches], "", fix)

    def _has_finite_gradient(self, images: NestedTensor, targets: Sequence[Target], step: int, index: int) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        seed_step(self._config.seed, step, index, self._accelerator.process_index)
        losses = self._criterion(self.model(images.to(self._accelerator.device), targets), targets)
        self._accelerator.backward(self._criterion.weighted_sum(losses))
        try:
            clip_gradient(self.model, 0)
        except NumericsError:
            return False
        return True

    def _explained(
        self, error: NumericsError, step: int, targets: Sequence[Sequence[Target]], module: str, fix: str
    ) -> NumericsError:
        ids = [target["image_id"] for part in targets for target in part]
        rank = self._accelerator.process_index
        return NumericsError(f"{error} | where: step={step} {module}image_id={ids} rank={rank} | fix: {fix}")

    def _save(self, images: NestedTensor, targets: Sequence[Target], step: int, index: int) -> str:
        """Save a batch whose numbers are not finite, and return how to look at it."""
        rank = self._accelerator.process_index
        failed = FailedBatch(
            model=self.model.state_dict(),
            config=config_to_dict(self._config),
            tensors=images.tensors,
            mask=images.mask,
            sizes=images.sizes,
            targets=plain_targets(targets),
            seed=self._config.seed,
            step=step,
            batch=index,
            rank=rank,
        )
        file = self._folder / f"failed_batch_{rank}.pt"
        return f"--replay {file}" if failed.save(file) else f"make room for its batch, which does not fit into {file}"
