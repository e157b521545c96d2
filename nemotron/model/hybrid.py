"""The language model: embedding, a stack of mixed layers, a head, and multi-token prediction."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron.model.ahead import RowsAhead
from nemotron.model.block import Block
from nemotron.model.cached_rows import CachedRows
from nemotron.model.candidates import CandidateNet
from nemotron.model.config import ModelConfig
from nemotron.model.edit_heads import EditHeads
from nemotron.model.init import init_weights
from nemotron.model.language import GatePass, LanguageExperts, Languages
from nemotron.model.linear import Embedding, Head, Linear, RMSNorm
from nemotron.model.router import Choice, ExpertChoice, RoutingStats
from nemotron.model.steps import Steps
from nemotron.ops.token_step import token_step


class Backbone(nn.Module):
    """Embedding, layers and final norm, under the names that released checkpoints use."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, letter) for letter in config.hybrid_override_pattern
        )
        self.norm_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)


class MTP(nn.Module):
    """The shared block: joins embedding and hidden state, mixes, normalizes.

    Released checkpoints keep the joining layers inside the first inner layer and the last norm
    inside the last one, so the modules live there.
    Source: NVIDIA/Megatron-LM: megatron/core/transformer/multi_token_prediction.py.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.mtp_pattern)
        first, last = self.layers[0], self.layers[-1]
        first.enorm = RMSNorm(size, eps)
        first.hnorm = RMSNorm(size, eps)
        first.eh_proj = Linear(2 * size, size)
        last.final_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        embedding: Float[Tensor, "B T D"],
        hidden: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None,
        *,
        cache: RowsAhead | None = None,
        has_stats: bool = False,
        padding: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], list[RoutingStats]]:
        """Predict one token further from the depth before and the next token's embedding.

        `cache` holds what the block, apart from the backbone, remembers of the rows. With
        `has_stats` the second result holds the routers' statistics, without `padding`.
        """
        first, last = self.layers[0], self.layers[-1]
        part = first.get_submodule
        joined = torch.cat([part("enorm")(embedding), part("hnorm")(hidden)], dim=-1)
        x = part("eh_proj")(joined)
        routing = []
        if cache is not None:
            cache.begin(x.shape[1])
        for index, layer in enumerate(self.layers):
            name = f"mtp.layers.{index}" if has_stats else None
            state = cache.layers[index] if cache is not None else None
            x, stats = layer(x, seq_idx, state, name, padding)
            if stats is not None:
                routing.append(stats)
        if cache is not None:
            cache.end(x.shape[1])
        return last.get_submodule("final_layernorm")(x), routing


class HybridLM(nn.Module):
    """Hybrid Mamba-2 / attention / mixture-of-experts language model (Nemotron 3).

    Parameters carry Hugging Face's on-disk names, except that the experts of a layer are stacked.
    They stay float32; `compute_dtype` is the dtype of activations and matrix products.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.backbone = Backbone(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        self.mtp = MTP(config) if config.mtp_pattern else None
        self.token_step = token_step
        self.steps: Steps | None = None
        self.candidates = self.edit_heads = None
        size, count = config.hidden_size, config.num_candidates
        if count > 1:
            self.candidates = CandidateNet(size, count)
        if config.edit_heads:
            self.edit_heads = EditHeads(size, count, config.edit_heads)
        self.language = None
        if config.language_experts is not None:
            first = config.hybrid_override_pattern.index("E")
            self.language = LanguageExperts(config.language_experts, size, first)

    def init_weights(self, seed: int) -> None:
        """Draw every parameter anew; the same seed gives the same tensors in any layout."""
        init_weights(self, self.config, seed)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        cache: CachedRows | None = None,
        routing: list[RoutingStats] | None = None,
        padding: Bool[Tensor, "B T"] | None = None,
        candidates: Int[Tensor, "B T K"] | None = None,
        languages: Languages | None = None,
        experts: Int[Tensor, "B T layers K"] | None = None,
        *,
        only_last: bool = False,
    ) -> Float[Tensor, "B S D"]:
        """Return the hidden states after the final norm; `logits` applies the head.

        `seq_idx` numbers the documents of a row, which then do not see each other. `cache` holds
        the rows' texts so far, which are continued. `routing` collects one entry per mixture layer,
        for training; it leaves out the positions that are `padding`. `candidates` are read in place
        of `input_ids`, K at each place. `languages` is what is known of the tokens' language, where
        experts belong to languages. `experts` are those of another pass over the tokens, which the
        mixture layers use again (`ExpertChoice`). With `only_last`, those of the last token of each
        row are all that is returned.
        """
        is_plain = languages is None and experts is None and routing is None
        # steps look up plain tokens themselves
        hidden = None if self.candidates is None else self.embed(input_ids, candidates)
        if cache is not None and self.steps is not None and is_plain:
            found = self.steps(self, input_ids, cache, embedded=hidden, only_last=only_last)
            if found is not None:
                return found
        if hidden is None:
            hidden = self.embed(input_ids)
        if cache is not None:
            cache.begin(input_ids.shape[1])
        gate = None if self.language is None else GatePass(self.language, languages, padding)
        layers = iter([] if experts is None else experts.flatten(0, 1).unbind(1))
        assert experts is None or gate is None, "the language decides the experts"
        for index, block in self.backbone.layers.named_children():
            choice: Choice | None = None if gate is None else gate.before(int(index), hidden)
            if experts is not None and block.letter == "E":
                choice = ExpertChoice(next(layers))
            state = cache.layers[int(index)] if cache is not None else None
            name = f"backbone.layers.{index}" if routing is not None else None
            hidden, stats = block(hidden, seq_idx, state, name, padding, choice)
            if stats is not None and routing is not None:
                routing.append(stats)
        if cache is not None:
            cache.end(input_ids.shape[1])
        hidden = self.backbone.norm_f(hidden)
        if gate is not None:
            hidden = gate.after(hidden, routing)
        return hidden[:, -1:] if only_last else hidden

    def embed(
        self, input_ids: Int[Tensor, "B T"], candidates: Int[Tensor, "B T K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Look up the embeddings, in the compute dtype; their gradient is summed in float32.

        `candidates` are read in place of `input_ids`. A model of several candidates reads a text
        without them as one in which all are alike.
        """
        if self.candidates is None:
            return self.look_up(input_ids)
        if candidates is None:
            candidates = input_ids.unsqueeze(2).expand(-1, -1, self.config.num_candidates)
        # [B, T·K] ids: ranks that share the tokens of a row share them by whole places
        embedded = self.look_up(candidates.flatten(1))
        return self.candidates(embedded.unflatten(1, (-1, candidates.shape[2])).flatten(2))

    def look_up(self, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """Return the embedding of each token by itself, in the compute dtype."""
        embedded = self.backbone.embeddings(ids)
        return embedded if self.compute_dtype is None else embedded.to(self.compute_dtype)

    def logits(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Apply the head; training uses a fused loss instead, which never holds these."""
        return self.lm_head(hidden)

    def mtp_hidden(
        self,
        hidden: Float[Tensor, "B T D"],
        inputs_ahead: Sequence[Int[Tensor, "B T"]],
        seq_idx: Int[Tensor, "B T"] | None,
        detach: bool = False,
        routing: list[RoutingStats] | None = None,
        padding: Bool[Tensor, "B T"] | None = None,
    ) -> list[Float[Tensor, "B T D"]]:
        """Return the hidden states that predict 2, 3, … tokens ahead, one tensor per depth.

        `inputs_ahead` are the tokens 1, 2, … places further in their document
        (`Batch.look_ahead`). `detach` keeps the gradients of these depths out of trunk and
        embedding.
        """
        assert self.mtp is not None, "the configuration has no multi-token-prediction block"
        results = []
        if detach:
            hidden = hidden.detach()
        for input_ids in inputs_ahead:
            embedding = self.embed(input_ids)
            if detach:
                embedding = embedding.detach()
            hidden, stats = self.mtp(
                embedding, hidden, seq_idx, has_stats=routing is not None, padding=padding
            )
            if routing is not None:
                routing += stats
            results.append(hidden)
        return results
