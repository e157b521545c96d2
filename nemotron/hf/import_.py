"""Making a run out of a folder in Hugging Face's layout."""

import datetime
import secrets
from pathlib import Path

from nemotron.checkpoint.read import MODEL_PREFIX
from nemotron.checkpoint.write import save
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import hash_file, write_bytes, write_json
from nemotron.hf.folder import CONFIG, LoadedFolder
from nemotron.hf.tokenizer_files import KEPT_FOLDER, TOKENIZER, read_kept_files, read_tokenizer

STEP = 0
"""Step of an imported checkpoint: nothing was trained here yet."""


def check_tokenizer(folder: Path, vocab_size: int) -> bytes:
    """Return the folder's `tokenizer.json` after a look into it.

    Raises:
        UserError: when it is absent, no tokenizer, or has more tokens than the model.
    """
    content = read_tokenizer(folder)
    try:
        tokenizer = Tokenizer(content)
    except ValueError as error:
        raise UserError(f"{folder / TOKENIZER} is no tokenizer.json: {error}.") from None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, vocab_size in {CONFIG} is "
            f"{vocab_size}; this is not the tokenizer of the model."
        )
    return content


def write_run(folder: Path, loaded: LoadedFolder, run: Path) -> list[str]:
    """Fill the empty folder `run` with checkpoint, tokenizer and provenance; returns notes.

    Raises:
        UserError: when the folder's small files are no JSON, or its tokenizer does not fit.
    """
    tokenizer = check_tokenizer(folder, loaded.config.vocab_size)
    kept, notes = read_kept_files(folder)
    write_bytes(run / TOKENIZER, tokenizer)
    (run / KEPT_FOLDER).mkdir()
    for name, content in kept.items():
        write_bytes(run / KEPT_FOLDER / name, content)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files = {path.name: hash_file(path) for path in sorted(folder.glob("*.safetensors"))}
    origin = {"from": folder.name, "time": now, "xxh128": files, "notes": list(loaded.notes)}
    provenance = {"id": secrets.token_hex(4), "starts": [], "imported": origin}
    write_json(run / "provenance.json", provenance)
    tensors = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in loaded.weights.items()}
    save(run / "checkpoints", STEP, tensors, {"imported": origin}, loaded.config, keep=1)
    return notes
