"""The training loop: Hugging Face's Trainer, with batches of lists, listwise losses and an IR measure."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import AutocastKwargs
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from pyterrier_msft.data.groups import Groups
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.scoring import forward, is_out_of_memory
from pyterrier_msft.training import cpu, distributed
from pyterrier_msft.training.batches import TOKENS_PER_PASS, BatchSchedule, Collator, GroupDataset
from pyterrier_msft.training.callbacks import (
    BestWeightsCallback,
    CheckpointCallback,
    CollapseCallback,
    HistoryCallback,
)
from pyterrier_msft.training.checkpoints import BEST_WEIGHTS_NAME, Checkpoint, save_weights
from pyterrier_msft.training.gradient_cache import gradient_cache_step, max_tokens_with_graph, split_chunks
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.validation import Validation

logger = logging.getLogger(__name__)

Batch = dict[str, Any]  # see Collator
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [G, L], labels [G, L], mask [G, L]) -> scalar."""


class ListwiseTrainer(Trainer):
    """A Trainer whose batches are lists of documents, and whose loss sees their scores as [G, L].

    The arguments are those of `run.train`, which makes it.
    """

    control: TrainerControl

    # Otherwise the loss isn't divided by the accumulation for models whose forward takes **kwargs.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        loss: Loss,
        network: PreTrainedModel,
        encoder: PairEncoder,
        groups: Groups,
        schedule: BatchSchedule,
        hyperparameters: Hyperparameters,
        *,
        dtype: torch.dtype,
        validation: Validation | None,
        history: list[dict[str, Any]],
        verbose: bool,
        identity: Mapping[str, str] | None,
        args: TrainingArguments,
    ) -> None:
        super().__init__(model=network, args=args, train_dataset=GroupDataset(groups, hyperparameters.seed))
        torch.manual_seed(args.seed + distributed.rank())  # other dropout masks on each rank
        self.list_loss, self.network, self.encoder, self.schedule = loss, network, encoder, schedule
        self.hyperparameters, self.dtype, self.validation = hyperparameters, dtype, validation
        self.batches_of_update: tuple[int, list[Batch]] = (-1, [])
        self.max_pairs: int | None = None  # per pass, once memory has run out
        self.max_tokens = max_tokens_with_graph(network, dtype, max_length=encoder.max_length, device=args.device)
        runs_alone = distributed.world_size() == 1 and not args.torch_compile
        self.workers = cpu.max_workers(network) if args.device.type == "cpu" and runs_alone else 1
        self.workers_checked = False
        if self.workers > 1:  # autocast's cache of weights serves all threads until the first of them leaves it
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self._add_callbacks(history, identity, verbose=verbose)

    # ---- one step

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Score a batch's pairs and compute the loss of its lists."""
        scores = torch.cat([forward(model, chunk) for chunk in inputs["chunks"]])  # (pairs,)
        return self.listwise_loss(scores, inputs) * distributed.world_size()  # DDP averages the gradients of the ranks

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add a batch's gradient. Where memory runs out, compute the update's batches again in passes half as large."""
        batches = self._batches_of_update(self._prepare_inputs(inputs))
        todo = batches[-1:]
        while True:
            try:
                return [self.add_gradient(model, batch) for batch in todo][-1]
            except RuntimeError as error:
                self._halve_passes(error, todo)
            model.zero_grad()  # the backward pass may have stopped halfway
            todo = batches

    def add_gradient(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Add a batch's gradient in the way that suits its size and the device; return its loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # optimizers without a schedule
        chunks = split_chunks(batch["chunks"], self.max_pairs)
        batch = {**batch, "chunks": chunks}
        loss_and_score_grads = partial(self.loss_and_score_grads, batch)
        if self._needs_gradient_cache(chunks):
            return gradient_cache_step(model, chunks, loss_and_score_grads, self.accelerator)
        if len(chunks) > 1 and self._uses_threads(model, chunks[0]):
            return cpu.threaded_step(model, chunks, loss_and_score_grads, self.workers)
        loss: torch.Tensor = super().training_step(model, batch)
        return loss / distributed.world_size()

    def listwise_loss(self, pair_scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Arrange the scores of pairs as lists, and compute the loss in float32."""
        labels, mask, slots = batch["labels"], batch["mask"], batch["slots"]  # (G, L), (G, L), (pairs,)
        # A document's score is that of its best window.
        scores = pair_scores.new_zeros(mask.numel()).scatter_reduce(0, slots, pair_scores, "amax", include_self=False)
        scores = scores.view(mask.shape)
        if distributed.world_size() > 1:
            scores, labels, mask = distributed.gather_lists(scores, labels, mask)
        with torch.autocast(scores.device.type, enabled=False):
            loss = self.list_loss(scores, labels, mask)
        if not torch.isfinite(loss):
            qids = ", ".join(batch["qids"][:8]) + (", …" if len(batch["qids"]) > 8 else "")
            raise ValueError(
                f"loss must be finite; got {loss.item()} at step {self.state.global_step + 1} (queries {qids}). Try a "
                f"learning_rate below {self.hyperparameters.learning_rate}"
            )
        self.rows.pairs = self.rows.pairs + mask.sum()
        self.collapse.observe(scores.detach(), mask)
        return loss

    def loss_and_score_grads(
        self, batch: Batch, pair_scores: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Compute the loss from the scores of each chunk, and its gradient at the scores of each chunk."""
        scores = torch.cat([part.detach() for part in pair_scores]).requires_grad_()
        loss = self.listwise_loss(scores, batch) / self.current_gradient_accumulation_steps
        grads = torch.autograd.grad(loss * distributed.world_size(), scores)[0]
        return loss.detach(), grads.split([len(part) for part in pair_scores])

    # ---- how a step is computed

    def _needs_gradient_cache(self, chunks: Sequence[dict[str, torch.Tensor]]) -> bool:
        tokens = sum(chunk["input_ids"].numel() for chunk in chunks)
        is_bounded = self.max_pairs is not None or self.hyperparameters.pairs_per_pass is not None
        needs_it = len(chunks) > 1 and (is_bounded or tokens > self.max_tokens)
        if self.args.device.type == "cpu" or is_bounded:  # else no rank needs it
            return distributed.all_reduce_max(int(needs_it)) > 0  # DDP wants all ranks to take the same way
        return needs_it

    def _uses_threads(self, model: torch.nn.Module, chunk: dict[str, torch.Tensor]) -> bool:
        if self.workers > 1 and not self.workers_checked:  # in the first step, when the optimizer is there
            self.workers_checked = True
            if not cpu.supports_threads(model, chunk):
                self.workers = 1
        return self.workers > 1

    def _batches_of_update(self, batch: Batch) -> list[Batch]:
        step, batches = self.batches_of_update
        batches = [*batches, batch] if step == self.state.global_step else [batch]
        self.batches_of_update = (self.state.global_step, batches)
        return batches

    def _halve_passes(self, error: RuntimeError, batches: Sequence[Batch]) -> None:
        chunks = [chunk for batch in batches for chunk in split_chunks(batch["chunks"], self.max_pairs)]
        pairs = max(len(chunk["input_ids"]) for chunk in chunks)
        if not is_out_of_memory(error) or pairs == 1:
            raise error
        if distributed.world_size() > 1:  # the other ranks have gone on
            raise RuntimeError(
                f"out of memory with {pairs} pairs per pass on rank {distributed.rank()}. Start again with "
                f"pairs_per_pass={pairs // 2}; the gradient is the same"
            ) from error
        self.max_pairs = pairs // 2
        logger.warning("out of memory with %d pairs per pass; continuing with %d", pairs, self.max_pairs)

    # ---- what Trainer asks for

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the whole run's batches. accelerate doesn't prepare it: it would change their order."""
        budget = TOKENS_PER_PASS.get(self.args.device.type, TOKENS_PER_PASS["cpu"])
        collate = Collator(
            self.encoder, min(budget, self.max_tokens), self.hyperparameters.pairs_per_pass, self.workers
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.schedule,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=_silence_tokenizers,
            pin_memory=self.args.device.type == "cuda",
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the validation metric, and tell the callbacks."""
        assert self.validation is not None
        value = self.validation.evaluate(self.network, self.encoder, self.dtype)
        metrics = {f"eval_{self.validation.metric}": value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights, and the best so far, into a checkpoint."""
        assert output_dir is not None
        if distributed.rank() == 0:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # which would declare it complete
            save_weights(self.network.state_dict(), folder / SAFE_WEIGHTS_NAME)
            if self.best is not None and self.best.best_weights is not None:
                save_weights(self.best.best_weights, folder / BEST_WEIGHTS_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        distributed.wait_for_everyone()  # before rank 0 writes the state that declares the checkpoint complete

    def _add_callbacks(
        self, history: list[dict[str, Any]], identity: Mapping[str, str] | None, *, verbose: bool
    ) -> None:
        schedule, hyperparameters = self.schedule, self.hyperparameters
        self.rows = HistoryCallback(history, schedule, hyperparameters, verbose=verbose)
        self.collapse = CollapseCallback(schedule)
        self.best: BestWeightsCallback | None = None
        self.remove_callback(PrinterCallback)
        # In this order: validations and checkpoints are logged steps.
        if self.validation is not None:
            self.best = BestWeightsCallback(schedule, hyperparameters, weights=self.network.state_dict)
            self.add_callback(self.best)
        self.saving: CheckpointCallback | None = None
        if identity is not None:
            self.saving = CheckpointCallback(identity, schedule, save=partial(self._save_checkpoint, self.model, None))
            self.add_callback(self.saving)
        self.add_callback(self.rows)
        self.add_callback(self.collapse)

    def resume_callbacks(self, checkpoint: Checkpoint) -> None:
        """Give the callbacks what they had exported into a checkpoint."""
        self.rows.resume(checkpoint)
        if self.best is not None:
            self.best.resume(checkpoint)
        if self.saving is not None:
            self.saving.is_resumed = True
        saved_by, world_size = checkpoint.world_size, distributed.world_size()
        if saved_by != world_size:
            logger.warning(
                "the checkpoint was saved by %d processes; resuming with %d: dropout masks will differ",
                saved_by, world_size,
            )  # fmt: skip

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: Trainer's estimate needs `input_ids`."""
        return 0


def _silence_tokenizers(worker: int) -> None:
    """Keep tokenizers from warning of its own threads in a forked worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
