"""The training loop: Hugging Face's Trainer, with batches of lists, listwise losses and an IR measure."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import AutocastKwargs
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.scoring import UNLIMITED, forward, is_out_of_memory
from pyterrier_msft.training import cpu, distributed
from pyterrier_msft.training.batches import (
    TOKENS_PER_PASS,
    BatchSchedule,
    Collator,
    GroupDataset,
    StepDataset,
    StepSchedule,
)
from pyterrier_msft.training.callbacks import CheckpointCallback, CollapseCallback, HistoryCallback, SelectionCallback
from pyterrier_msft.training.checkpoints import KEPT_WEIGHTS_NAME, MARKER_NAME, Checkpoint, save_weights
from pyterrier_msft.training.gradient_cache import Chunk, gradient_cache_step, max_graph_tokens, split_chunks
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.objectives import Objective
from pyterrier_msft.training.validation import Validation

logger = logging.getLogger(__name__)

Batch = dict[str, Any]  # see Collator.step


class ListwiseTrainer(Trainer):
    """A Trainer whose batches are lists of documents, and whose loss sees their scores as [G, L].

    The arguments are those of `run.train`, which creates it.
    """

    control: TrainerControl

    def __init__(
        self,
        objectives: Sequence[Objective],
        network: PreTrainedModel,
        encoder: PairEncoder,
        hyperparameters: Hyperparameters,
        *,
        dtype: torch.dtype,
        scorer: PairEncoder,
        validation: Validation | None,
        history: list[dict[str, Any]],
        progress: str | None,
        identity: Mapping[str, str] | None,
        args: TrainingArguments,
    ) -> None:
        seed, plan = hyperparameters.seed, objectives[0].plan
        dataset = StepDataset([GroupDataset(objective.groups, seed) for objective in objectives])
        super().__init__(model=network, args=args, train_dataset=dataset)
        self.schedule = StepSchedule([BatchSchedule(part.groups, part.plan, seed=seed) for part in objectives])
        torch.manual_seed(args.seed + distributed.rank())  # different dropout masks on each rank
        self.objectives, self.network, self.encoder, self.plan = objectives, network, encoder, plan
        self.hyperparameters, self.dtype, self.scorer = hyperparameters, dtype, scorer
        self.validation = None if validation is None else validation.sample(plan.validation_queries)
        self.max_graph_tokens = max_graph_tokens(network, dtype, max_length=encoder.max_length, device=args.device)
        # Changed for the rest of the run when memory runs out.
        self.always_caches, self.max_pairs_per_pass = False, hyperparameters.pairs_per_pass
        runs_alone = distributed.world_size() == 1 and not args.torch_compile
        self.threads = cpu.max_threads(network) if args.device.type == "cpu" and runs_alone else 1
        self.threads_checked = False
        if self.threads > 1:  # the first thread to finish would clear autocast's cache of weights
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self._add_callbacks(history, identity, progress=progress)

    # ---- one step

    # DDP averages the gradients of the ranks, each of which computes the loss of the whole batch. So a loss is
    # multiplied by the number of ranks where it is differentiated, and returned without that factor.

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Score a batch's pairs and compute the loss of its lists."""
        scores = torch.cat([forward(model, chunk) for chunk in inputs["chunks"]])  # (pairs,)
        return self.listwise_loss(scores, inputs) * distributed.world_size()

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add a batch's gradient to the parameters; if memory runs out, retry with less at a time."""
        batch = self._prepare_inputs(inputs)
        while True:
            try:
                loss = self.add_gradient(model, batch)
                self.rows.count_step(self.batch_pairs, self.part_losses)
                return loss
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._use_less_memory(error, batch)
            # After the except block, so that the traceback no longer holds the activations.
            model.zero_grad()  # the backward pass may have stopped halfway

    def add_gradient(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Add a batch's gradient in the way that suits its size and the device; return its loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers
        chunks = split_chunks(batch["chunks"], self.max_pairs_per_pass)
        batch = {**batch, "chunks": chunks}
        loss_and_score_grads = partial(self.loss_and_score_grads, batch)
        if self._ranks_use_gradient_cache(chunks):
            return gradient_cache_step(model, chunks, loss_and_score_grads, self.accelerator)
        if len(chunks) > 1 and self._uses_threads(model, chunks[0]):
            return cpu.threaded_step(model, chunks, loss_and_score_grads, self.threads)
        loss: torch.Tensor = super().training_step(model, batch)
        return loss / distributed.world_size()

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip the gradient. On a CPU, it is only multiplied if that changes it, which halves the time."""
        if self.args.device.type != "cpu":
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if norm > self.args.max_grad_norm:
            clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def listwise_loss(self, pair_scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the sum of the objectives' losses, each times its weight, from the scores of all pairs."""
        parts = batch["parts"]
        scores = pair_scores.split([len(part["slots"]) for part in parts])
        found = [self.part_loss(*arguments) for arguments in zip(self.objectives, scores, parts, strict=True)]
        losses, pairs = zip(*found, strict=True)
        # They stay on the device, to avoid a synchronization.
        self.part_losses, self.batch_pairs = torch.stack(losses).detach(), torch.stack(pairs).sum()
        total: torch.Tensor = sum(part.weight * loss for part, loss in zip(self.objectives, losses, strict=True))
        return total

    def part_loss(
        self, objective: Objective, pair_scores: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Arrange the scores of pairs as lists; compute their loss in float32, and count the documents."""
        labels, mask, slots = batch["labels"], batch["mask"], batch["slots"]  # (G, L), (G, L), (pairs,)
        # A document's score is that of its best window.
        scores = pair_scores.new_zeros(mask.numel()).scatter_reduce(0, slots, pair_scores, "amax", include_self=False)
        scores = scores.view(mask.shape)
        if distributed.world_size() > 1:
            scores, labels, mask = distributed.gather_lists(scores, labels, mask)
        with torch.autocast(scores.device.type, enabled=False):
            loss = objective.loss(scores, labels, mask)
        if not torch.isfinite(loss):
            qids = ", ".join(batch["qids"][:8]) + (", …" if len(batch["qids"]) > 8 else "")
            step = self.state.global_step + 1
            if step == 1:
                raise ValueError(
                    f"loss must be finite; got {loss.item()} at step 1 (queries {qids}). No weight has changed yet, so "
                    "check the loss and the labels. If an earlier fit has diverged, start again with a new re-ranker"
                )
            raise ValueError(
                f"loss must be finite; got {loss.item()} at step {step} (queries {qids}). Try a learning_rate below "
                f"{self.plan.learning_rate}, with a new re-ranker"
            )
        self.collapse.observe(scores.detach(), mask)
        return loss, mask.sum()

    def loss_and_score_grads(
        self, batch: Batch, pair_scores: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Compute the loss from the scores of all chunks, and its gradient with respect to the scores of each chunk."""
        scores = torch.cat([part.detach() for part in pair_scores]).requires_grad_()
        loss = self.listwise_loss(scores, batch)
        grads = torch.autograd.grad(loss * distributed.world_size(), scores)[0]
        return loss.detach(), grads.split([len(part) for part in pair_scores])

    # ---- how a step is computed

    def _ranks_use_gradient_cache(self, chunks: Sequence[Chunk]) -> bool:
        """Return whether this batch needs gradient caching on any rank: DDP requires the same path on all ranks."""
        limit, accumulates = self.max_pairs_per_pass, self.hyperparameters.gradient_accumulation > 1
        if limit is None and not accumulates and not self.always_caches and self.max_graph_tokens == UNLIMITED:
            return False  # the same on all ranks, without communication
        pairs = sum(len(chunk["input_ids"]) for chunk in chunks)
        tokens = sum(chunk["input_ids"].numel() for chunk in chunks)
        is_too_large = (limit is not None and pairs > limit) or tokens > self.max_graph_tokens
        needs_it = len(chunks) > 1 and (accumulates or self.always_caches or is_too_large)
        return distributed.all_reduce_max(int(needs_it)) > 0

    def _uses_threads(self, model: torch.nn.Module, chunk: Chunk) -> bool:
        if self.threads > 1 and not self.threads_checked:  # in the first step, when the optimizer exists
            self.threads_checked = True
            if not cpu.supports_threads(model, chunk):
                self.threads = 1
        return self.threads > 1

    def _use_less_memory(self, error: RuntimeError, batch: Batch) -> None:
        """Hold fewer activations from now on: first by gradient caching, then in passes of half the size."""
        chunks = split_chunks(batch["chunks"], self.max_pairs_per_pass)
        pairs = len(max(chunks, key=lambda chunk: chunk["input_ids"].numel())["input_ids"])  # of the largest chunk
        if distributed.world_size() > 1:  # the other ranks have already continued
            raise RuntimeError(
                f"out of memory with {pairs} pairs per pass on rank {distributed.rank()}. Start again with "
                f"pairs_per_pass={max(1, pairs // 2)}"
            ) from error
        if len(chunks) > 1 and not self.always_caches:
            self.always_caches = True
            logger.warning("out of memory; continuing with gradient caching")
        elif pairs > 1:
            self.always_caches, self.max_pairs_per_pass = True, pairs // 2
            logger.warning("out of memory with %d pairs per pass; continuing with %d", pairs, pairs // 2)
        else:
            raise error

    # ---- methods that Trainer calls

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the whole run's batches, not prepared by accelerate, which would change their order."""
        budget = TOKENS_PER_PASS.get(self.args.device.type, TOKENS_PER_PASS["cpu"])
        collate = Collator(
            self.encoder, min(budget, self.max_graph_tokens), self.hyperparameters.pairs_per_pass, self.threads,
            keeps_ids=self.objectives[0].groups.load is None,  # texts that are looked up may be too many
        )  # fmt: skip
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.schedule,
            collate_fn=collate.step,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=_silence_tokenizers,
            pin_memory=self.args.device.type == "cuda",
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the validation metric, and notify the callbacks."""
        assert self.validation is not None
        value, by_query = self.validation.values(self.network, self.scorer, self.dtype)
        metrics = {f"eval_{self.validation.metric}": value}
        self.log(metrics)
        if self.selection is not None:
            self.selection.by_query = by_query
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss of each objective with their sum."""
        super().log({**logs, **self.rows.part_losses()} if "loss" in logs else logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights, and the best so far, into a checkpoint."""
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER_NAME).touch()  # on every rank, because each writes files of its own
        if distributed.rank() == 0:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # it marks a checkpoint as complete
            save_weights(self.network.state_dict(), folder / SAFE_WEIGHTS_NAME)
            if self.selection is not None and self.selection.kept_weights is not None:
                save_weights(self.selection.kept_weights, folder / KEPT_WEIGHTS_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        distributed.wait_for_everyone()  # before rank 0 writes the state, which marks the checkpoint as complete

    def _add_callbacks(
        self, history: list[dict[str, Any]], identity: Mapping[str, str] | None, *, progress: str | None
    ) -> None:
        plan, hyperparameters = self.plan, self.hyperparameters
        names = [part.name for part in self.objectives] if len(self.objectives) > 1 else []
        self.collapse = CollapseCallback(plan)
        self.selection: SelectionCallback | None = None
        self.remove_callback(PrinterCallback)
        # The order matters: HistoryCallback logs the steps at which those before it validate or save.
        if self.validation is not None:
            self.selection = SelectionCallback(
                plan, hyperparameters, weights=self.network.state_dict, evaluate=self.evaluate
            )
            self.add_callback(self.selection)
        self.saving: CheckpointCallback | None = None
        if identity is not None:
            self.saving = CheckpointCallback(identity, plan, save=partial(self._save_checkpoint, self.model, None))
            self.add_callback(self.saving)
        self.rows = HistoryCallback(
            history, plan, hyperparameters, part_names=names, progress=progress, selection=self.selection
        )
        self.add_callback(self.rows)
        self.add_callback(self.collapse)

    def resume_callbacks(self, checkpoint: Checkpoint) -> None:
        """Restore the state that the callbacks exported to a checkpoint."""
        self.rows.resume(checkpoint)
        if self.selection is not None:
            self.selection.resume(checkpoint)
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
    """Keep tokenizers from warning about threads in a forked worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
