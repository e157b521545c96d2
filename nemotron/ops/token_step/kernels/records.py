"""What a kernel reads about a call and each layer: addresses and sizes."""

import numpy as np

MAMBA, ATTENTION, EXPERTS, DENSE = 0, 1, 2, 3

NUMBERS = (
    "rows", "length",  # texts, and tokens of each
    "size", "width",  # of the residual stream; rounded up to whole blocks
    "embeddings", "tokens", "slots", "lengths",
    "given", "embedding_norm", "hidden_norm", "proj",  # of a join; 0: there is none
    "tables", "table_length", "block_size", "skipped",  # blocks of keys and values
    # float32 buffers, and the addresses of their rows
    "hidden", "hidden_rows", "x", "x_rows",
    "wide", "wide_rows", "wide_width",  # what a first projection gives
    "mid", "mid_rows", "mid_width",  # what a last projection reads
    "latent", "latent_rows", "latent_width",
    "routed", "routed_rows",
    "scores", "scores_rows", "scores_width",
    "copies", "copies_width",  # of each token for each of its experts
    "weights",  # float32, of each copy
    "order",  # copies by expert, then where each expert's begin
    "lists",  # addresses of rows by expert: inputs, copies, results
    "scratch", "scratch_size",  # of each thread, in bytes
    "counter",
    "counts",  # tokens of each row that change the states; 0: all, and layers are read
    "final_norm", "result",
    "is_part",  # whether further layers follow, and the last one only stores keys and values
    "kept",  # what would change the states of all Mamba-2 layers; 0: they change
    "chosen",  # the experts of all mixture layers
    "layers", "num_layers",  # address of the records of those that are passed
)  # fmt: skip
"""The int64 fields of a call, which come first."""

CALL = np.dtype(
    [(name, np.int64) for name in NUMBERS] + [(name, np.float32) for name in ("eps", "join_eps")],
    align=True,
)

LAYER = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind", "norm",
            "first", "first_blocks",  # W of the first projection, and its blocks of outputs
            "last", "last_count", "last_blocks",  # W of the last one, its inputs, its blocks
            # Mamba-2
            "kernel", "bias", "decay", "skip", "dt_bias", "gate_norm",
            "heads", "head_size", "state_size", "groups", "window",
            "conv", "ssm", "kept_before",  # numbers that earlier layers keep of each token
            # attention
            "queries", "key_heads", "keys", "values",
            # experts; the shared one has the two projections above
            "router", "router_bias", "num_experts", "top_k", "router_blocks", "normalize",
            "up", "down", "expert_size", "expert_blocks", "input_size", "input_blocks",
            "to_latent", "from_latent",
            "chosen_before",  # experts that earlier layers choose for each token
        )
    ]
    + [(name, np.float32) for name in ("eps", "gate_eps", "smallest", "largest", "scaling")],
    align=True,
)  # fmt: skip

PRODUCT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "x", "x_step", "y", "y_step", "rows", "tables", "weight", "inputs", "blocks", "counter"
        )
    ]
)  # fmt: skip
"""A product by itself: steps are bytes from a row to the next."""
