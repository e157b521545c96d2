"""Direct preference optimization as a stage: pre-training's rows, of pairs of answers."""

from dataclasses import dataclass

import torch

from nemotron.data.batch import Batch
from nemotron.data.loader import TrainingData
from nemotron.data.tokenizer import load_tokenizer
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
from nemotron.parallel.collectives import all_gather
from nemotron.parallel.dims import resolve_dims
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.preference.batches import PreferenceBatches, with_reference
from nemotron.posttrain.preference.config import DpoConfig
from nemotron.posttrain.preference.objective import FIGURES, DpoObjective, RowRanks
from nemotron.posttrain.preference.references import References, collect, read_reference
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.build import build_local
from nemotron.train.layout import MeshCoordinate
from nemotron.train.loss import StepSums
from nemotron.train.pretraining import open_data, rehearse_data, text_batches
from nemotron.train.schedule import TrainingPlan, plan_training
from nemotron.train.setup import Setup
from nemotron.train.trainer import Trainer
from nemotron.train.validation import own_batches


class PreferenceOptimization:
    """The stage that learns which of two answers is better."""

    def plan(self, config: DpoConfig) -> TrainingPlan:
        """Return the phases of a run and their learning rates.

        Raises:
            UserError: when they contradict each other.
        """
        return plan_training(config)

    def rehearse(self, config: DpoConfig, plan: TrainingPlan) -> list[str]:
        """Open the pairs and the reference without writing; returns lines about them.

        Raises:
            UserError: when the pairs are unfit, or there is no fitting reference.
        """
        lines = rehearse_data(config, plan)
        found = read_reference(config, load_tokenizer(config.data.tokenizer))
        return [*lines, *(f"{place} is the reference" for place in found.contents)]

    def build(
        self,
        config: DpoConfig,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks,
    ) -> Setup:
        """Open the pairs, build the trainer, and have the reference score them if it must.

        Raises:
            UserError: when the pairs are unfit, or there is no fitting reference.
        """
        data = open_data(config, plan, ranks)
        data.check_length()
        reference = read_reference(config, data.tokenizer)
        local = build_local(config, device, ranks)
        auxiliary = Auxiliary(config.loss, 0, bool(config.model.moe_layers), config.knows_languages)
        objective = DpoObjective(config.dpo, auxiliary, _row_ranks(local))
        references = References()
        dims = resolve_dims(config.parallel, ranks.world)
        batches = PreferenceBatches(
            text_batches(config, plan, data, device, ranks),
            data,
            references,
            reference.contents,
            reader=MeshCoordinate(ranks.rank, dims).batch,
            num_readers=dims.batch,
        )
        trainer = Trainer(config, local, objective, batches, plan, device, peak_flops, ranks)
        # after the trainer, which gives the layers the formats of `precision`
        collect(references, config, data, reference, local, ranks)
        validation = Validation(trainer, objective, data, references)
        return Setup(trainer, data, validation if data.validation_domains else None)


def _row_ranks(local: LocalModel) -> RowRanks:
    """Return the ranks that each have some tokens of a row; those of `tp` get all of them."""
    if local.mesh is None or local.mesh.dims.cp == 1:
        return RowRanks()
    group = local.mesh.group("cp")
    return RowRanks(
        local.mesh.dims.cp, lambda values: all_gather(values.unsqueeze(0), 0, group).sum(0)
    )


@dataclass(frozen=True)
class Validation:
    """The terms and figures of held-out pairs."""

    trainer: Trainer
    objective: DpoObjective
    data: TrainingData
    references: References

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return loss and figures of each domain, and over the pairs of all."""
        found = {domain: self._sums(domain) for domain in self.data.validation_domains}
        self.trainer.local.drop_gathered()
        values: dict[str, float] = {}
        for domain, (sums, counts) in found.items():
            values |= self._metrics(f"validation/{domain}", sums, counts)
        terms, numbers = zip(*found.values(), strict=True)
        whole = torch.stack(terms).sum(0), torch.stack(numbers).sum(0)
        return self._metrics("validation", *whole) | values

    def _sums(self, domain: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return terms and counts of a domain, over all ranks."""
        trainer, config = self.trainer, self.trainer.config
        local, rows = trainer.local, config.batch.micro_batch
        sums = StepSums(self.objective, (), 0, local.device)
        counts = torch.zeros(len(self.objective.names), dtype=torch.float64)
        values = self.references.held_out[domain].values
        held_out = self.data.validation(domain, tokens=config.evaluation.tokens, rows=rows)
        for each in own_batches(held_out, local, rows):
            trainer.progress.move()
            batch = with_reference(each.batch, [values] * len(each.batch.labels))
            if local.counts_rows:
                counts += self.objective.counts(batch)
            self._add(sums, local.share_rows(batch).to(local.device))
        counts = sums.add_up(trainer.ranks, counts.to(local.device), counts_loss=local.counts_loss)
        return sums.terms.cpu(), counts.cpu()

    def _add(self, sums: StepSums, batch: Batch) -> None:
        local = self.trainer.local

        def share(
            model: HybridLM,
            hidden: torch.Tensor | None,
            micro: Batch,
            routing: list[RoutingStats],
        ) -> torch.Tensor:
            sums.add(self.objective.sums(model, hidden, micro, []), [])
            return torch.zeros((), device=micro.labels.device)

        if local.pipeline is not None:
            local.pipeline.evaluate([batch], share)
            return
        [model] = local.models
        share(model, model(batch.input_ids, batch.seq_idx), batch, [])

    def _metrics(self, name: str, sums: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
        if not counts[0]:
            return {}
        means = dict(zip(self.objective.names, (sums / counts).tolist(), strict=True))
        loss = self.objective.combine(sums, counts).item()
        figures = {f"{name}/{f.removeprefix('dpo/')}": means[f] for f in FIGURES}
        return {f"{name}/loss": loss, **figures}
