"""What correction minimizes: terms of the slots and of the second reading, each a sum."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.data.correct.marks import Marks
from nemotron.model.edit_heads import EditPredictions
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.correct.anti_copy import anti_copy
from nemotron.posttrain.correct.config import CorrectOptions
from nemotron.posttrain.correct.layout import ANSWER, DETECT, DURATION, END, RUN, WRONG
from nemotron.posttrain.correct.span_ctc import span_ctc
from nemotron.train.auxiliary import Auxiliary, LanguageObjective


@dataclass(frozen=True)
class CorrectObjective(LanguageObjective):
    """The terms of one kind of correction, and the balance loss of the routers.

    tag: cross entropy at each place. ctc: CTC by token of the targets. soft: the
    detector's anti-copy loss by column, CTC by token of the runs' targets, cross entropy at kept
    slots. duration: cross entropy by slot, squared error of durations and cross entropy of edit
    flags by token, squared error of the predicted loss by pair.
    """

    options: CorrectOptions
    auxiliary: Auxiliary
    marks: Marks

    @property
    def factors(self) -> dict[str, float]:
        """The terms of the kind; the recipe weighs squared errors and kept slots."""
        options = self.options
        return {
            "tag": {"main": 1.0},
            "ctc": {"main": 1.0},
            "soft": {"detect": 1.0, "span": 1.0, "keep": options.keep_loss},
            "duration": {
                "main": 1.0,
                "duration": options.duration_coeff,
                "edit": options.edit_coeff,
                "candidate": options.candidate_coeff,
            },
        }[options.kind]

    def own_counts(self, batch: Batch) -> list[float]:
        """Return how many places each term is a sum over."""
        extras: list[str] = {
            "tag": [],
            "ctc": [ANSWER],
            "soft": [DETECT, ANSWER],
            "duration": [DURATION, WRONG, END],
        }[self.options.kind]
        counts = [float(_count(batch.extras[name])) for name in extras]
        labels = float(_count(batch.labels))
        return {
            "tag": [labels],
            "ctc": counts,
            "soft": [*counts, labels],
            "duration": [labels, *counts],
        }[self.options.kind]

    def own_sums(
        self, model: HybridLM, hidden: Float[Tensor, "B T D"], batch: Batch
    ) -> list[Float[Tensor, ""]]:
        """Return sums of nats, and of squared errors."""
        if self.options.kind == "tag":
            return [model.lm_head.loss(hidden, batch.labels)]
        if self.options.kind == "ctc":
            return [self._runs(model, hidden, batch)]
        terms = self._soft if self.options.kind == "soft" else self._duration
        return terms(model, hidden, batch)

    def _runs(self, model: HybridLM, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the CTC of all runs."""
        run, answer = batch.extras[RUN], batch.extras[ANSWER]
        row, place = (run != NO_LABEL).nonzero(as_tuple=True)
        # runs lie one after the other, so that a change of row or number begins the next
        key = row * run.shape[1] + run[row, place]
        number, slots = torch.unique_consecutive(key, return_inverse=True, return_counts=True)[1:]
        first = slots.cumsum(0) - slots
        slot = torch.arange(len(key), device=key.device) - first[number]
        shape = (len(slots), int(slots.max()) if len(slots) else 1)
        found = torch.full(shape, NO_LABEL, device=key.device)
        found[number, slot] = answer[row, place]
        lengths = (found != NO_LABEL).sum(1)
        targets = found[:, : int(lengths.max()) if len(slots) else 0].clamp(min=0)
        choices = F.pad(targets, (1, 0), value=self.marks.blank)  # [R, 1 + U]
        chosen = model.lm_head.chosen_logprobs(hidden[row, place], choices[number])
        if not len(slots):
            return chosen.sum()
        logprobs = chosen.new_zeros(*shape, choices.shape[1])
        logprobs = logprobs.index_put((number, slot), chosen)
        return span_ctc(logprobs, targets, slots, lengths).sum()

    def _soft(self, model: HybridLM, hidden: Tensor, batch: Batch) -> list[Tensor]:
        detect = batch.extras[DETECT]
        at = detect != NO_LABEL
        labels, truth, weight = detect[at], self.marks.truth, self.options.anti_copy

        def detected(logits: Tensor, which: slice) -> Tensor:
            return anti_copy(logits, labels[which], truth, weight).sum()

        found = model.lm_head.compare(hidden[at], detected)
        return [found, self._runs(model, hidden, batch), self._smoothed(model, hidden, batch)]

    def _smoothed(self, model: HybridLM, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the cross entropy of the labels, with smoothing."""
        at = batch.labels != NO_LABEL
        labels, smoothing = batch.labels[at], self.options.label_smoothing

        def entropy(logits: Tensor, which: slice) -> Tensor:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(wide, labels[which], reduction="sum", label_smoothing=smoothing)

        return model.lm_head.compare(hidden[at], entropy)

    def _duration(self, model: HybridLM, hidden: Tensor, batch: Batch) -> list[Tensor]:
        durations, wrong = batch.extras[DURATION], batch.extras[WRONG]
        end = batch.extras[END]
        at, ends = (durations != NO_LABEL).any(-1), end != NO_LABEL
        columns = batch.input_ids.unsqueeze(2) if batch.candidates is None else batch.candidates
        assert model.edit_heads is not None, "a rule of the recipe"
        own = model.look_up(columns.flatten(1)).unflatten(1, columns.shape[1:])
        guesses: EditPredictions = model.edit_heads(hidden[at], own[at], hidden[ends])
        has_token = durations[at] != NO_LABEL
        clamped = durations[at].clamp(max=self.options.max_duration)
        error = (guesses.durations - clamped)[has_token].square().sum()
        flags = F.binary_cross_entropy_with_logits(
            guesses.edits[has_token], wrong[at][has_token].to(guesses.edits.dtype), reduction="sum"
        )
        guess = guesses.losses.gather(1, end[ends].unsqueeze(1)).squeeze(1)
        missed = (guess - self._means(model, hidden, batch)[ends]).square().sum()
        return [self._smoothed(model, hidden, batch), error, flags, missed]

    @torch.no_grad()
    def _means(self, model: HybridLM, hidden: Tensor, batch: Batch) -> Float[Tensor, "B T"]:
        """Return at each place the mean cross entropy of the labels of its pair."""
        losses = -model.lm_head.token_logprobs(hidden, batch.labels)
        assert batch.seq_idx is not None, "pairs do not see each other"
        pair = batch.seq_idx.long()
        total, count = torch.zeros_like(losses), torch.zeros_like(losses)
        total.scatter_add_(1, pair, losses)
        count.scatter_add_(1, pair, (batch.labels != NO_LABEL).to(losses.dtype))
        return (total / count.clamp(min=1)).gather(1, pair)


def _count(values: Tensor) -> int:
    return int((values != NO_LABEL).sum())
