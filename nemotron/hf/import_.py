"""Making a run out of a folder in Hugging Face's layout."""

import json
from pathlib import Path

from nemotron.checkpoint.read import MODEL_PREFIX
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import CheckpointNotSaved, Content, save
from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.files import hash_file, write_bytes
from nemotron.hf.folder import CONFIG, LoadedFolder, is_exported, read_folder
from nemotron.hf.hub import find_folder
from nemotron.hf.tokenizer_files import GENERATION, TOKENIZER, check_tokenizer, read_kept_files
from nemotron.outputs import check_output, output_folder, publish, writing_beside
from nemotron.run.files import RunFiles
from nemotron.run.provenance import Facts, record_import
from nemotron.terminal import print_text

COMMAND = "import"
STEP = 0
"""Step of an imported checkpoint: nothing was trained here yet."""


def import_(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Make a run out of a folder of safetensors: a checkpoint, its tokenizer and provenance.

    Returns the exit code.

    Raises:
        UserError: when the folder is not exactly what its `config.json` says, or `out` is taken;
            nothing is written.
    """
    origin, target = find_folder(folder), output_folder(out)
    if not is_exported(origin):
        raise UserError(
            "does not exist; give a folder in Hugging Face's layout.", where=str(origin / CONFIG)
        )
    check_output(target, COMMAND, [origin], overwrite=overwrite)
    loaded = read_folder(origin)
    try:
        with writing_beside(target, COMMAND) as partial:
            notes = write_run(origin, loaded, RunFiles(partial))
            publish(partial, target, COMMAND)
    except CheckpointNotSaved as problem:
        print_text(f"failed: {problem}")
        return FAILED
    for note in (*loaded.notes, *notes):
        print_text(f"note: {note}")
    print_text(f"imported {len(loaded.weights):,} tensors to {target}")
    return DONE


def write_run(folder: Path, loaded: LoadedFolder, run: RunFiles) -> list[str]:
    """Fill the empty folder of `run` with checkpoint, tokenizer and provenance; returns notes.

    Raises:
        UserError: when the folder's small files are no JSON, or its tokenizer does not fit.
    """
    tokenizer = check_tokenizer(folder / TOKENIZER, loaded.config.vocab_size)
    kept, notes = read_kept_files(folder)
    write_bytes(run.tokenizer, tokenizer)
    if GENERATION not in kept and len(loaded.stop_ids) > 1:
        kept[GENERATION] = json.dumps({"eos_token_id": list(loaded.stop_ids)}).encode()
    run.companions.mkdir()
    for name, content in kept.items():
        write_bytes(run.companions / name, content)
    files = {path.name: hash_file(path) for path in sorted(folder.glob("*.safetensors"))}
    facts: Facts = {"from": folder.name, "xxh128": files, "notes": list(loaded.notes)}
    facts["formats"] = loaded.formats
    origin = record_import(run.provenance, facts)
    tensors = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in loaded.weights.items()}
    state = SavedState(imported=origin)
    save(run.checkpoints, Content(STEP, tensors, state, loaded.config), keep=1)
    return notes
