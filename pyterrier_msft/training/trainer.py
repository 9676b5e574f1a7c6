"""Groups, a loss and a model to a trained model: the loop, on Hugging Face's Trainer.

What is ours: which group comes when, how a batch of lists is scored, the loss call, and validation by an IR metric.
The loss is a function; which objective it serves is not known here.
"""

import contextlib
import copy
import json
import logging
import math
import os
import pickle
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyterrier as pt
import torch
import torch.distributed as dist
from accelerate import AutocastKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir
from transformers.masking_utils import eager_mask
from transformers.trainer_callback import TrainerState

from pyterrier_msft.data.groups import Groups
from pyterrier_msft.model.encoding import PairEncoder
from pyterrier_msft.model.first_token import CPU_ATTENTION, FIRST_TOKEN_HEADS, first_token_only
from pyterrier_msft.model.loading import quiet_transformers
from pyterrier_msft.model.scoring import core_pool, forward, memory_of_machine, out_of_memory, tokens_that_fit
from pyterrier_msft.notices import warn
from pyterrier_msft.training import distributed as processes
from pyterrier_msft.training.batches import _Batches, _Collator, _ReadAhead
from pyterrier_msft.training.hyperparameters import Hyperparameters
from pyterrier_msft.training.validation import Validation

logger = logging.getLogger(__name__)


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# Tokens whose activations are computed together: more than in scoring, for the sake of the backward pass.
TOKENS_PER_PASS = {"cpu": 4096, "cuda": 65536}


CORES = 8  # at most that learn apart, since each has gradients of its own; they take an eighth of the memory at most


# A resumed run may lose this much work; a step count alone would say nothing about time.
SECONDS_BETWEEN_CHECKPOINTS = 900


ENOUGH = 16  # batches, to tell a model that learns from one that guesses


STATE_FILE, BEST_FILE = "msft_training.json", "msft_best.safetensors"


PARTIAL = "partial"  # the folder in which a checkpoint is written before it takes its place


# What a failed write raises: torch and safetensors have errors of their own.
UNWRITTEN = (OSError, RuntimeError, SafetensorError)


def train(
    model: PreTrainedModel,
    encoder: PairEncoder,
    groups: Groups,
    loss: Loss,
    settings: Hyperparameters,
    *,
    dtype: torch.dtype,
    validation: Validation | None = None,
    checkpoint_dir: str | Path | None = None,
    identity: Mapping[str, str] | None = None,
    history: list[dict[str, Any]] | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Train a model in place, on the device that it is on.

    Args:
        model: A cross-encoder with one output.
        encoder: How pairs become tokens.
        groups: What to learn from.
        loss: (scores [G, L], labels [G, L], mask [G, L]) -> scalar.
        settings: The hyperparameters.
        dtype: The precision to compute in; weights and loss are float32.
        validation: Given, the best weights by its metric are what remains, and `patience` applies.
        checkpoint_dir: Where checkpoints go, and where an interrupted training is taken up again.
        identity: What decides the result, by name: a checkpoint of another identity is refused.
        history: A list that rows are appended to as they come, so that an interruption leaves them; else a new one.
        verbose: Whether a progress bar is shown.

    Returns:
        The history: a row (a dict) a log entry.

    Raises:
        ValueError: If the loss is not finite, or a checkpoint in `checkpoint_dir` is of something else.
    """
    history = [] if history is None else history
    identity = dict(identity or {})
    device = next(model.parameters()).device
    batches = _Batches(groups, settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_isolated())
        stack.enter_context(quiet_transformers())
        if checkpoint_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyterrier_msft_")))
        else:
            folder = writable(checkpoint_dir, "checkpoint_dir")
        arguments = _arguments(
            model, settings, batches, device, dtype, folder
        )  # from here on the processes know each other
        _same_everywhere(identity)
        if checkpoint_dir is not None:
            _enough_room(folder, model, settings, keeps_best=validation is not None)
        progress = _Progress(
            history, batches, settings, validation, folder if checkpoint_dir else None, identity, verbose
        )
        checkpoint = progress.resume()
        if progress.stopped and progress.best_weights:  # patience had run out: there is nothing to go on with
            progress.close()
            model.load_state_dict(progress.best_weights)
            return history
        # FSDP cuts a model in pieces for good, so it gets a copy; the model itself stays whole for validation.
        network = copy.deepcopy(model.cpu()) if arguments.fsdp else model
        stack.enter_context(_prepared(network, settings, device, dtype))
        stack.enter_context(first_token_only(network))
        trainer = _ListTrainer(
            model=network,
            args=arguments,
            train_dataset=groups,  # for its length; the batches are our own
            callbacks=[progress],
        )
        if checkpoint_dir is None:
            _keep_events(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.configure(model, encoder, batches, loss, settings, validation, dtype, progress)
        finished = False
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            finished = True
        except KeyboardInterrupt:
            logger.warning(
                "training was interrupted at step %d of %d; the re-ranker holds %s weights so far; %s",
                progress.step, batches.updates,
                "the best" if progress.best_weights else "the first" if arguments.fsdp else "the last",
                f"the same call goes on from the last checkpoint in {folder}" if checkpoint_dir
                else "with checkpoint_dir=... a training can be gone on with",
            )  # fmt: skip
            raise
        finally:
            trainer.stop_reading()
            # Mixed precision leaves a patched `forward` behind, which would round the scores of a later float32 use.
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            if progress.best_weights:
                model.load_state_dict(progress.best_weights)
            elif finished:
                trainer.whole_model()
            model.to(device).eval()
            progress.close()
            if processes.count() > 1:
                trainer.accelerator.free_memory()  # and the hooks on its parameters
    return history


def check_device(device: torch.device) -> None:
    """Raise a ValueError for a GPU that Trainer wouldn't train on."""
    taken = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
    if device.type == "cuda" and device.index not in {None, taken}:
        raise ValueError(
            f"expected 'cuda:{taken}', which Trainer takes, as the device to train on, found {str(device)!r}: choose a "
            "GPU by the environment variable CUDA_VISIBLE_DEVICES, and none with torchrun"
        )


def interrupted_training(checkpoint_dir: str | Path | None) -> dict[str, str]:
    """The identity of the training whose checkpoints are in a folder; empty if there are none."""
    newest = None if checkpoint_dir is None else _newest_checkpoint(Path(checkpoint_dir))
    return {} if newest is None else json.loads((newest / STATE_FILE).read_text())["identity"]


# ---- the loop


class _ListTrainer(Trainer):
    """A Trainer whose batch is a set of lists and whose loss sees them as [G, L]."""

    control: TrainerControl

    # Else the loss isn't divided by the accumulation for models whose forward takes **kwargs.
    loss_is_scaled_for_ga = False

    def configure(
        self,
        network: PreTrainedModel,
        encoder: PairEncoder,
        batches: _Batches,
        loss: Loss,
        settings: Hyperparameters,
        validation: Validation | None,
        dtype: torch.dtype,
        progress: "_Progress",
    ) -> None:
        self.network, self.encoder, self.batches, self.list_loss = network, encoder, batches, loss
        self.settings, self.validation, self.dtype, self.progress = settings, validation, dtype, progress
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError("expected torchrun and GPUs with trainer_args={'fsdp': ...}, found neither or one of them")
        progress.save = lambda: self._save_checkpoint(self.model_wrapped, None)
        progress.weights = lambda: self.whole_model().state_dict()
        # Its processes draw dropout's random numbers apart.
        torch.manual_seed(self.args.seed + processes.rank())
        self.ahead: _ReadAhead | None = None
        # Tokens whose activations can be held at once, as far as that can be told beforehand.
        self.fitting = tokens_that_fit(
            network, dtype, length=encoder.max_length, training=True, device=self.args.device
        )  # fmt: skip
        self.max_pairs: int | None = None  # a pass, once the memory has been too small
        self.cores, self.asked = self._cores(), False
        if self.cores > 1:
            # The weights that it casts are kept for all threads, until the first of them leaves it.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        # The update at hand, and the batches that it sums up so far.
        self.update = -1
        self.summed: list[dict[str, Any]] = []

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by accelerate, which would hide the sampler and its order.
        budget = TOKENS_PER_PASS.get(self.args.device.type, TOKENS_PER_PASS["cpu"])
        # A tokenizer's settings are one for all threads, and validation may come while batches are read ahead.
        encoder = replace(self.encoder, tokenizer=copy.deepcopy(self.encoder.tokenizer))
        collate = _Collator(encoder, min(budget, self.fitting), self.settings.pairs_per_pass, self.cores)
        return DataLoader(self.batches, batch_sampler=self.batches, collate_fn=collate)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        # On a CPU whose batches need nothing looked up, a thread would only take the model's time. Here and not in the
        # loader, which Trainer makes anew where it resumes.
        if self.args.device.type == "cpu" and self.batches.groups.load is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.ahead is None:
            self.ahead = _ReadAhead(epoch_iterator)
        return super().get_batch_samples(self.ahead, num_batches, device)

    def stop_reading(self) -> None:
        """End the thread that makes batches, if there is one."""
        if self.ahead is not None:
            self.ahead.close()

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return 0  # an estimate from `input_ids`, which a batch of chunks doesn't have; nobody reads it

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        loss = self._loss(torch.cat([_forward(model, chunk) for chunk in inputs["chunks"]]), inputs)
        return loss * processes.count()  # of whose gradients the mean is taken

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self.progress.pairs += int(inputs["mask"].sum())
        if self.update != self.state.global_step:
            self.update, self.summed = self.state.global_step, []
        self.summed.append(self._prepare_inputs(inputs))
        todo = self.summed[-1:]
        while True:
            try:
                return [self._gradient(model, each) for each in todo][-1]
            except RuntimeError as error:
                pairs = max(len(chunk["input_ids"]) for each in todo for chunk in self._chunks(each))
                if not out_of_memory(error) or pairs == 1:
                    raise
                if processes.count() > 1:  # the others have gone on: there is no trying again
                    raise RuntimeError(
                        f"out of memory with {pairs} pairs a pass in process {processes.rank()}: start again with "
                        f"pairs_per_pass={pairs // 2}, which gives the same gradient"
                    ) from error
            # The backward pass may have stopped half-way: what this update has summed up so far is computed again.
            self.max_pairs = pairs // 2
            logger.warning("out of memory with %d pairs a pass: going on with %d", pairs, self.max_pairs)
            model.zero_grad()
            todo = self.summed

    def _chunks(self, inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        chunks: list[dict[str, torch.Tensor]] = inputs["chunks"]
        if self.max_pairs is None:
            return chunks
        return [
            dict(zip(chunk, part, strict=True))
            for chunk in chunks
            for part in zip(*(values.split(self.max_pairs) for values in chunk.values()), strict=True)
        ]

    def _gradient(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # those without a schedule
        inputs = {**inputs, "chunks": self._chunks(inputs)}
        if self.is_fsdp_enabled:  # whose processes must call the model equally often
            most = processes.largest(len(inputs["chunks"]))
            inputs["chunks"] += [inputs["chunks"][-1]] * (most - len(inputs["chunks"]))
        if self._bounded(inputs):
            return self._bounded_step(model, inputs)
        if len(inputs["chunks"]) > 1 and self._apart(model, inputs["chunks"][0]):
            return self._step_by_core(model, inputs)
        loss: torch.Tensor = super().training_step(model, inputs)
        return loss / processes.count()

    def _bounded(self, inputs: dict[str, Any]) -> bool:
        bounded = self.max_pairs is not None or self.settings.pairs_per_pass is not None
        if not bounded:  # and where one process has too much for its memory, all go the same way
            tokens = sum(chunk["input_ids"].numel() for chunk in inputs["chunks"])
            bounded = processes.largest(int(tokens > self.fitting)) > 0
        return processes.largest(int(bounded and len(inputs["chunks"]) > 1)) > 0

    def _bounded_step(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The same gradient with one chunk's activations at a time.

        Scores come first, without a graph; the loss is differentiated at the scores; then each chunk is computed
        again, under the random state that it had, and takes its part of the gradient further down.
        """
        states, parts = [], []
        with torch.no_grad():
            for chunk in inputs["chunks"]:
                states.append(_random_state(self.args.device))
                parts.append(_forward(model, chunk))
        after = _random_state(self.args.device)
        loss, gradients = self._at_the_scores(parts, inputs)
        for number, (chunk, state, gradient) in enumerate(zip(inputs["chunks"], states, gradients, strict=True), 1):
            last = number == len(parts)
            _set_random_state(state, self.args.device)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                self.accelerator.backward((_forward(model, chunk) * gradient).sum())
        _set_random_state(after, self.args.device)
        return loss

    def _at_the_scores(
        self, parts: list[torch.Tensor], inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss, and its gradient at the scores of each chunk."""
        scores = torch.cat([part.detach() for part in parts]).requires_grad_()
        loss = self._loss(scores, inputs) / self.current_gradient_accumulation_steps
        gradient = torch.autograd.grad(loss * processes.count(), scores)[0]
        return loss.detach(), gradient.split([len(part) for part in parts])

    # -- a CPU's cores

    def _cores(self) -> int:
        """How many cores compute chunks of their own, if the model is one for that."""
        other_ways = processes.count() > 1 or self.args.torch_compile or self.is_deepspeed_enabled
        if self.args.device.type != "cpu" or other_ways:
            return 1
        fitting = CORES
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system that doesn't tell
            trained = sum(p.numel() * p.element_size() for p in self.network.parameters() if p.requires_grad)
            fitting = memory_of_machine() // 8 // max(1, trained)
        return max(1, min(CORES, fitting, torch.get_num_threads()))

    def _apart(self, model: torch.nn.Module, chunk: dict[str, torch.Tensor]) -> bool:
        """Whether chunks are computed at once. Found out in the first step, when the optimizer is there.

        Not where an optimizer makes its step within the backward pass, by hooks, and not where a model draws random
        numbers that threads would have in common: dropout has its own, but for what isn't a module of torch's, and for
        layers that the backward pass computes again.
        """
        if self.cores > 1 and not self.asked:
            self.asked, before = True, _global_states()
            with torch.no_grad():
                _forward(model, {name: values[:1] for name, values in chunk.items()}, seed=0)
            drew = pickle.dumps(_global_states()) != pickle.dumps(before)
            hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
            again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            if drew or hooked or again:
                self.cores = 1
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            torch.set_rng_state(torch.from_numpy(before[2]))
        return self.cores > 1

    def _step_by_core(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The same gradient with a chunk a core, in both passes: faster than all cores on one operation.

        Gradients are summed in the order of chunks, whichever is done first, so that trainings are equal bit for bit.
        """
        chunks = inputs["chunks"]
        seeds = torch.randint(2**62, (len(chunks),)).tolist()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        cores = min(self.cores, len(chunks))
        with core_pool(cores) as pool:
            parts = list(pool.map(partial(_forward, model), chunks, seeds))
            loss, above = self._at_the_scores(parts, inputs)

            def downwards(scores: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
                return torch.autograd.grad(scores, trained, gradient, allow_unused=True)

            for start in range(0, len(chunks), cores):  # since all that is done waits with its gradients
                now = slice(start, start + cores)
                for gradients in pool.map(downwards, parts[now], above[now]):
                    for parameter, gradient in zip(trained, gradients, strict=True):
                        if gradient is None:
                            continue
                        if parameter.grad is None:
                            parameter.grad = gradient.clone()  # else two parameters might have one tensor in common
                        else:
                            parameter.grad.add_(gradient)
                del gradients
        return loss

    def _loss(self, flat: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        labels, mask, places = inputs["labels"], inputs["mask"], inputs["places"]  # (G, L), (G, L), (windows,)
        own, again = flat.tensor_split([len(places)])  # chunks that are computed again have no place
        # A document's score is its best window's, so that the gradient goes to that one.
        scores = own.new_zeros(mask.numel()).scatter_reduce(0, places, own, "amax", include_self=False)
        scores = scores.view(mask.shape)
        if processes.count() > 1:
            scores, labels, mask = self._of_all(scores, labels, mask)
        with torch.autocast(flat.device.type, enabled=False):
            loss = self.list_loss(scores, labels, mask) + 0 * again.sum()
            with torch.no_grad():  # what the loss would be if all documents of a query had one score
                means = scores.masked_fill(~mask, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
                constant = self.list_loss(means.expand_as(scores).contiguous(), labels, mask)
        if not torch.isfinite(loss):
            raise ValueError(
                f"expected a finite loss, found {loss.item()} at step {self.state.global_step + 1} "
                f"(queries {', '.join(inputs['qids'][:8])}{', …' if len(inputs['qids']) > 8 else ''}): "
                f"is the learning rate of {self.settings.learning_rate} too high?"
            )
        self.progress.watch(scores.detach(), mask, float(constant - loss.detach()))
        return loss

    def _of_all(
        self, scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The lists of all processes, in the batch's order; the others' scores are constants.

        So the loss is that of the whole batch in each process, also where it isn't a mean over lists.
        """
        rank, count = processes.rank(), processes.count()
        own = torch.tensor([*mask.shape, int(mask.sum()), self.progress.overdue()], device=mask.device)
        every = [torch.empty_like(own) for _ in range(count)]
        dist.all_gather(every, own)
        sizes = torch.stack(every).tolist()
        height, width = (max(size[i] for size in sizes) for i in (0, 1))
        self.progress.pairs += sum(size[2] for size in sizes) - sizes[rank][2]
        self.progress.must_save |= any(size[3] for size in sizes)

        def padded(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, width - values.shape[1], 0, height - values.shape[0]))

        lists = torch.stack([padded(values.detach().float()) for values in (scores, labels, mask)])  # (3, G, L)
        gathered = [torch.empty_like(lists) for _ in range(count)]
        dist.all_gather(gathered, lists)
        # The n-th list of the r-th process is the batch's (n * count + r)-th.
        merged = [torch.stack(parts, 1).flatten(0, 1) for parts in zip(*gathered, strict=True)]
        with_own = [padded(scores) if number == rank else part[0] for number, part in enumerate(gathered)]
        real = merged[2].bool().any(-1)  # and not a filler
        return torch.stack(with_own, 1).flatten(0, 1)[real], merged[1][real], merged[2][real].bool()

    def whole_model(self) -> PreTrainedModel:
        """The model with the weights of now, and not in pieces."""
        if self.is_fsdp_enabled:
            pieces = self.model.state_dict()
            whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in pieces.items()}
            self.network.load_state_dict(whole)
        return self.network

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self.validation is not None
        network = self.whole_model().to(self.args.device)
        value = self.validation.measure(network, self.encoder, self.dtype)
        if self.is_fsdp_enabled:
            network.cpu()
        metrics = {f"eval_{self.validation.metric}": value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / PARTIAL)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights under the names that they have here; FSDP's come with its optimizer."""
        assert output_dir is not None
        if processes.rank() == 0:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            if not self.is_fsdp_enabled:
                save_file(_untied(self.model.state_dict()), Path(output_dir) / "model.safetensors", {"format": "pt"})

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint beside the one before and then put it in place: what has its name is whole.

        A write that fails is said once, and training goes on with the checkpoint before: hours are worth more.
        """
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.progress.saved, self.progress.must_save = time.monotonic(), False
        failed = None
        try:
            super()._save_checkpoint(model, trial)
            if processes.rank() == 0:
                self.progress.write(folder / PARTIAL / name)
        except UNWRITTEN as error:
            if self.is_fsdp_enabled:  # whose processes would wait for this one
                raise
            failed = str(error)
        # Each process writes its random state: all must be there.
        failures = [failure for failure in processes.each(lambda: failed) if failure is not None]
        if processes.rank() == 0:
            try:
                if not failures:
                    durable(folder / PARTIAL / name)
                    os.replace(folder / PARTIAL / name, folder / name)
                    durable(folder)
            except OSError as error:
                failures = [str(error)]
            keep = self.args.save_total_limit
            whole = [] if failures or keep is None else _checkpoints(folder)[:-keep]
            for path in [folder / PARTIAL, *whole]:
                shutil.rmtree(path, ignore_errors=True)
        if failures:
            self.progress.not_saved(failures[0])


def _forward(model: torch.nn.Module, chunk: dict[str, torch.Tensor], seed: int | None = None) -> torch.Tensor:
    """Scores; given a seed, dropout takes its random bits from that one, and not from what threads have in common."""
    _dropout.bits = None if seed is None else np.random.SFC64(seed)
    return forward(model, chunk)


class _Progress(TrainerCallback):
    """Says when to log, validate, save and stop; keeps the history and the best weights."""

    def __init__(
        self,
        history: list[dict[str, Any]],
        batches: _Batches,
        settings: Hyperparameters,
        validation: Validation | None,
        folder: Path | None,
        identity: dict[str, str],
        verbose: bool,
    ) -> None:
        self.history, self.batches, self.settings = history, batches, settings
        self.validates, self.folder, self.identity = validation is not None, folder, identity
        self.metric = str(settings.metric)
        self.eval_every = settings.eval_every or max(1, batches.updates // 10)
        self.log_every = max(1, min(self.eval_every, batches.updates // 50))
        self.best, self.not_better, self.stopped = -math.inf, 0, False
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.step, self.pairs, self.pairs_logged = 0, 0, 0
        self.seconds_before = 0.0
        self.started = self.logged = self.saved = time.monotonic()
        self.first_row = len(history)
        self.spread, self.alarmed = math.inf, False
        self.must_save, self.complained, self.resumed = False, False, False
        self.save: Callable[[], None]
        self.weights: Callable[[], dict[str, torch.Tensor]]
        self.gains: list[float] = []  # a batch each
        self.bar = pt.tqdm(total=batches.updates, desc="training", unit="step") if verbose else None

    # -- when

    def overdue(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.folder is not None and time.monotonic() - self.saved > SECONDS_BETWEEN_CHECKPOINTS

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # At once, since a folder that can't hold a checkpoint should be known of at once. And an interrupted training
        # can be gone on with from its very start.
        if self.folder is not None and not self.resumed and not args.fsdp:
            self.save()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step = state.global_step
        last = self.step >= self.batches.updates
        control.should_evaluate |= self.validates and (last or self.step % self.eval_every == 0)
        control.should_log |= last or control.should_evaluate or self.step % self.log_every == 0
        if self.folder is not None:
            if processes.count() == 1:  # else it was agreed on
                self.must_save |= self.overdue()
            control.should_log |= self.must_save  # or the loss since the last row would be lost
            control.should_save |= last or self.must_save or self.step % self.eval_every == 0
        if self.bar is not None:
            self.bar.update(self.step - self.bar.n)

    # -- what came out

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return  # the metric, which on_evaluate has, or Trainer's summary
        now = time.monotonic()
        self.history.append(
            {
                "step": state.global_step,
                "epoch": min(state.global_step * self.settings.gradient_accumulation, len(self.batches))
                / self.batches.per_epoch,
                "loss": float(logs["loss"]),
                "learning_rate": float(logs["learning_rate"]),
                "seconds": self.seconds_before + now - self.started,
                "pairs_per_second": (self.pairs - self.pairs_logged) / max(now - self.logged, 1e-9),
            }
        )
        self.logged, self.pairs_logged = now, self.pairs
        if self.bar is not None:
            self.bar.set_postfix(
                {k: f"{self.history[-1][k]:.3g}" for k in ("loss", self.metric) if k in self.history[-1]}
            )
        # Not at the start: a new head differs little between documents.
        last = state.global_step >= self.batches.updates
        settled = state.global_step >= max(10, self.batches.updates // 5) or (last and state.global_step >= 4)
        if settled and self.spread < 1e-3 and not self.alarmed:
            self.alarmed = True
            warn(
                f"all documents of a query get the same score (they differ by {self.spread:.1e} at step "
                f"{state.global_step}): check that qids of results and qrels match, that labels are not all equal, and "
                "the learning rate (too high collapses a model, too low never leaves the new head's constant)"
            )

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        value = float(metrics[f"eval_{self.metric}"])
        self.history[-1][self.metric] = value
        self.history[-1]["seconds"] = self.seconds_before + time.monotonic() - self.started
        self.logged = time.monotonic()  # validation is not training time
        if value > self.best:
            self.best, self.not_better = value, 0
            self.best_weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.weights().items()}
        else:
            self.not_better += 1
            self.stopped = self.settings.patience is not None and self.not_better >= self.settings.patience
            control.should_training_stop |= self.stopped
            control.should_save |= self.stopped and self.folder is not None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        gains = np.array(self.gains[len(self.gains) // 2 :])
        if len(gains) < ENOUGH or self.alarmed or gains.mean() >= gains.std() / math.sqrt(len(gains)):
            return
        self.alarmed = True
        warn(
            f"the model ranks no better than by chance: over the last {len(gains)} batches its loss was no lower than "
            "with one score for all documents of a query; check that the labels belong to these queries, and the "
            f"learning rate of {self.settings.learning_rate}"
        )

    def watch(self, scores: torch.Tensor, mask: torch.Tensor, gain: float) -> None:
        """Follow how far scores differ within a list, and how much lower the loss is than if they were all equal.

        A model that gives all documents one score has collapsed.
        """
        self.gains.append(gain)
        low = scores.masked_fill(~mask, math.inf).amin(-1)
        high = scores.masked_fill(~mask, -math.inf).amax(-1)
        # The median list, so that a list of one document, or one that is learnt already, doesn't hide the rest.
        self.spread = float((high - low).median())

    # -- what an interrupted training needs besides Trainer's own checkpoint

    def write(self, checkpoint: Path) -> None:
        """Write it into a checkpoint."""
        if self.best_weights is not None:
            save_file(_untied(self.best_weights), checkpoint / BEST_FILE)
        content = {
            "identity": self.identity,
            "history": self.history[self.first_row :],
            "best": None if self.best_weights is None else self.best,
            "not_better": self.not_better,
            "stopped": self.stopped,
            "pairs": self.pairs,
            "seconds": self.seconds_before + self.saved - self.started,
            "processes": processes.count(),
        }
        (checkpoint / STATE_FILE).write_text(json.dumps(content))

    def not_saved(self, error: str) -> None:
        """Say once that a checkpoint could not be written; a ValueError if there is none to go on from."""
        if self.step == 0:
            raise ValueError(f"expected a checkpoint_dir that a checkpoint can be written to, found {error}")
        if not self.complained and processes.rank() == 0:
            warn(
                f"the checkpoint of step {self.step} could not be written to {self.folder}: {error}; training goes on, "
                "and an interruption would go back to the one before"
            )
        self.complained = True

    def resume(self) -> str | None:
        """The newest checkpoint in the folder, with our own state taken from it; None to start anew.

        Raises:
            ValueError: If it is one of another training.
        """
        newest, content = processes.from_first(self._newest)
        if newest is None:
            return None
        self.history.extend(content["history"])
        self.not_better, self.stopped, self.pairs = content["not_better"], content["stopped"], content["pairs"]
        self.pairs_logged, self.seconds_before = self.pairs, content["seconds"]
        if content["best"] is not None:
            self.best, self.best_weights = content["best"], load_file(newest / BEST_FILE)
        self.step, self.resumed = _step_of(newest), True
        logger.info("resuming from %s", newest)
        if content["processes"] != processes.count():
            logger.warning(
                "the checkpoint was written by %d processes and is gone on with by %d: dropout takes other numbers",
                content["processes"], processes.count(),
            )  # fmt: skip
        return str(newest)

    def _newest(self) -> tuple[Path | None, Any]:
        if self.folder is None:
            return None, None
        newest = _newest_checkpoint(self.folder)
        if newest is None:
            return None, None
        content = json.loads((newest / STATE_FILE).read_text())
        found = content["identity"]
        other = [
            f"{name} {found.get(name, 'unknown')} instead of {value}"
            for name, value in self.identity.items()
            if found.get(name) != value
        ]
        if other:
            raise ValueError(
                f"expected a checkpoint of this training in {self.folder}, found one of {', '.join(other)}; give "
                "another checkpoint_dir, or delete it"
            )
        # What was being written, or being deleted, when the training was interrupted.
        for path in {self.folder / PARTIAL, *self.folder.glob("checkpoint-*")} - {*_checkpoints(self.folder)}:
            shutil.rmtree(path, ignore_errors=True)
        return newest, content

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


def _arguments(
    model: PreTrainedModel,
    settings: Hyperparameters,
    batches: _Batches,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
) -> TrainingArguments:
    ours: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": batches.updates,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip_norm or 0.0,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": "linear",
        "seed": settings.seed,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "logging_strategy": "no",  # _Progress decides when
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 1,  # besides the one that is being written
        "ddp_find_unused_parameters": False,
        # They never change, and a broadcast in each pass would need as many passes in every process.
        "ddp_broadcast_buffers": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    theirs = dict(settings.trainer_args)
    if theirs.get("fsdp"):
        config = dict(theirs.get("fsdp_config") or {})
        if config.get("version", 2) != 2:
            raise ValueError("expected FSDP of version 2 in trainer_args, found version 1")
        # Some families name no parts to cut into, others ones that accelerate can't cut: the layers always will do.
        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = sorted({type(layer).__name__ for layers in lists for layer in layers})
        theirs["fsdp_config"] = {"transformer_layer_cls_to_wrap": layers, **config}
    arguments = TrainingArguments(**{**ours, **theirs})
    if arguments.world_size != processes.count():
        raise ValueError(
            f"expected processes that torchrun has started, or one, found a group of {processes.count()} that Trainer "
            "takes no part in"
        )
    # Several GPUs in one process would mean DataParallel, which splits lists; torchrun is the way to use them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _keep_events(trainer: Trainer) -> None:
    """Where there is no folder but a temporary one, TensorBoard's files go to ./runs, as they do by its own default."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = default_logdir()


@contextlib.contextmanager
def _prepared(
    model: PreTrainedModel, settings: Hyperparameters, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """The model as it shall be while it trains (dropout, frozen parts, attention), and as it was afterwards."""
    dropouts = [(module, "p", module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    # Some families keep attention's probability as a plain number.
    dropouts += [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ("attention_dropout", "dropout_prob")
        if isinstance(getattr(module, name, None), float)
    ]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attention = model.config._attn_implementation
    try:
        if settings.dropout is not None:
            for module, name, _ in dropouts:
                setattr(module, name, settings.dropout)
        if device.type == "cpu":
            _suit_cpu(model, dtype)
        if settings.freeze_position_embeddings:
            frozen = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
            if not frozen:
                warn(f"{type(model).__name__} has no position embeddings to freeze")
            for module in frozen:
                module.requires_grad_(False)
        yield
    finally:
        for module, name, value in dropouts:
            setattr(module, name, value)
            vars(module).pop("forward", None)
        for parameter, value in trainable:
            parameter.requires_grad_(value)
            parameter.grad = None
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _suit_cpu(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What is slow on a CPU, and the same in effect: dropout's random numbers, and fused attention's backward pass."""
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    for module in dropouts:
        module.forward = partial(_dropout_of, module)  # type: ignore[method-assign]
    if model.config._attn_implementation != "sdpa":
        return
    if dropouts and model.config.model_type in FIRST_TOKEN_HEADS:
        model.set_attn_implementation(CPU_ATTENTION)
    elif not dropouts and dtype == torch.bfloat16:
        model.set_attn_implementation("eager")


def _dropout_of(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    return _Dropout.apply(x, module.p) if module.training and module.p > 0 else x


class _Randomness(threading.local):
    """Where a thread's dropout takes its random bits; None: a source for each call, by torch's random state."""

    bits: np.random.SFC64 | None = None


_dropout = _Randomness()


class _Dropout(torch.autograd.Function):
    """Dropout by numpy's random numbers, which come many times as fast as torch's on a CPU.

    Torch's random state decides them, so that seeding, resuming and computing a chunk again work as ever.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        source = _dropout.bits or np.random.SFC64(int(torch.randint(2**62, ())))
        bits = source.random_raw(-(-x.numel() // 4)).view(np.uint16)
        ctx.kept, ctx.scale = (bits[: x.numel()] >= round(p * 2**16)).reshape(x.shape), 1 / (1 - p)
        return _thinned(x, ctx.kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _thinned(gradients[0], ctx.kept, ctx.scale), None


def _thinned(x: torch.Tensor, kept: np.ndarray, scale: float) -> torch.Tensor:
    if x.dtype == torch.float32:  # numpy multiplies numbers by truth values faster, but knows no bfloat16
        return torch.from_numpy(np.multiply(x.detach().numpy(), kept)).mul_(scale)
    return (x * torch.from_numpy(kept)).mul_(scale)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in the form of transformers' eager one, (B, heads, T, d), with the dropout above."""
    weights = torch.matmul(query * scaling, key.mT)
    weights = (weights if attention_mask is None else weights.add_(attention_mask)).softmax(-1)
    weights = _Dropout.apply(weights, dropout) if dropout > 0 else weights
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(CPU_ATTENTION, _attention)


AttentionMaskInterface.register(CPU_ATTENTION, eager_mask)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Leave the global random states as they were, since Trainer seeds all three when it is made; and the environment.

    accelerate notes there that FSDP is in use, which a later training would believe.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    environment = dict(os.environ)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for name in os.environ.keys() - environment.keys():
                if name.startswith(("ACCELERATE_", "FSDP_")):
                    del os.environ[name]


def _global_states() -> tuple[Any, Any, np.ndarray]:
    """Of Python, numpy and torch."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()  # noqa: NPY002


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    if device.type == "mps":
        return torch.get_rng_state(), torch.mps.get_rng_state()
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None and device.type == "mps":
        torch.mps.set_rng_state(state[1])
    elif state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _untied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that safetensors takes: it refuses two names for one piece of memory."""
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def writable(folder: str | Path, name: str) -> Path:
    """The folder that an argument names, made if need be; tried now, not hours later.

    Raises:
        ValueError: If it can't be written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"expected a folder that can be written to as {name}, found {path}: {error}") from error
    return path


def durable(folder: Path) -> None:
    """Have a folder's files on the disk itself, so that a power cut doesn't leave names without content."""
    if os.name != "posix":
        return  # where folders can't be opened
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted((file.parent for file in folder.glob(f"checkpoint-*/{STATE_FILE}")), key=_step_of)


def _newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(_checkpoints(folder)), None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _enough_room(folder: Path, model: PreTrainedModel, settings: Hyperparameters, *, keeps_best: bool) -> None:
    """Raise a ValueError if two checkpoints, the newest and the one that is being written, don't fit the disk."""
    if "optim" in settings.trainer_args:  # whose state may be of any size
        return
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    trained = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    needed = 2 * (weights + keeps_best * weights + 2 * trained)  # with the best so far, and two means of the gradient
    there = sum(file.stat().st_size for file in folder.glob("checkpoint-*/*") if file.is_file())
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise ValueError(
            f"expected room for two checkpoints, {needed / 1e9:.2g} GB, in {folder}, found {free / 1e9:.2g} GB"
        )


def _same_everywhere(identity: dict[str, str]) -> None:
    for number, other in enumerate(processes.each(lambda: identity)):
        names = [name for name, value in identity.items() if other.get(name) != value]
        if names:
            raise ValueError(
                f"expected the same training in every process, found another {', '.join(names)} in process {number} "
                f"than in process {processes.rank()}"
            )
