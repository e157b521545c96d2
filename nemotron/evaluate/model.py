"""A finished model to evaluate: its weights, and how it is asked to solve tasks."""

from dataclasses import dataclass
from pathlib import Path

from nemotron.data.chat.foreign import ForeignTemplate
from nemotron.data.chat.template import TEMPLATE, TURN_END
from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.hf.folder import is_exported
from nemotron.hf.hub import find_folder
from nemotron.hf.tokenizer_files import TOKENIZER
from nemotron.loading import load_with_tokenizer, read_chat_files, recipe_ops, stop_ids
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.contents import model_contents
from nemotron.posttrain.prompts import Prompts
from nemotron.run.files import RunFiles


@dataclass(frozen=True)
class Asking:
    """How prompts are written and where answers end."""

    prompt: str = "auto"
    """chat, text, or auto: chat if the model brings a chat template."""
    thinking: bool = True
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """A model with its prompts."""

    model: HybridLM
    prompts: Prompts
    tokenizer_file: Path

    @classmethod
    def load(cls, place: Path, device: str, how: Asking) -> "Evaluated":
        """Read a run, checkpoint or exported folder.

        Raises:
            UserError: when one of its files is absent or damaged, or it knows no chat format.
        """
        folder = find_folder(place)
        model, tokenizer = load_with_tokenizer(folder, find_device(device), ops=recipe_ops(folder))
        template = read_chat_files(folder).template
        is_chat = template is not None if how.prompt == "auto" else how.prompt == "chat"
        ends = set(stop_ids(folder, model.config))
        if is_chat:
            try:
                ends.add(tokenizer.id(TURN_END))
            except UserError:
                if template in (None, TEMPLATE):
                    rule = f"needs the token {TURN_END}, which the model's tokenizer lacks; "
                    raise UserError(rule + "use text.", key="--prompt", value="chat") from None
        foreign = None if template in (None, TEMPLATE) else ForeignTemplate(str(template))
        prompts = Prompts(
            tokenizer,
            frozenset(ends),
            is_chat,
            how.thinking,
            how.stop,
            foreign if is_chat else None,
        )
        run = None if is_exported(folder) else RunFiles.around(folder)
        return cls(
            model.requires_grad_(False),
            prompts,
            folder / TOKENIZER if run is None else run.tokenizer,
        )

    def digest(self) -> str:
        """Return a hash of the weights, which says whether answers are this model's."""
        [found] = model_contents("", None, self.model).values()
        return found
