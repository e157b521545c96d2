"""Options of data that is made of conversations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron.data.config import ChatOptions

OPTION_NAMES = {
    "messages_column": "--messages",
    "tools_column": "--tools",
    "enable_thinking": "--no-thinking",
    "truncate_history_thinking": "--all-thinking",
    "reasoning_off_rate": "--no-reasoning",
    "reasoning_budget_rate": "--cut-reasoning",
}
"""Fields of `ChatOptions`, and the options that set them."""


@dataclass(frozen=True)
class ConversationOptions:
    """Whether rows are conversations, and how these are written."""

    chat: Annotated[
        bool, typer.Option("--chat", help="Read rows as conversations with messages and tools.")
    ] = False
    messages: Annotated[str, typer.Option(help="Column that holds the messages.")] = "messages"
    tools: Annotated[str, typer.Option(help="Column that holds the tools.")] = "tools"
    thinking: Annotated[bool, typer.Option(help="Keep the reasoning of conversations.")] = True
    all_thinking: Annotated[
        bool, typer.Option("--all-thinking", help="Keep the reasoning of earlier turns as well.")
    ] = False
    reasoning_off_rate: Annotated[
        float,
        typer.Option(
            "--no-reasoning",
            min=0,
            max=1,
            help="Share of conversations to write without reasoning.",
        ),
    ] = 0.0
    reasoning_budget_rate: Annotated[
        float,
        typer.Option(
            "--cut-reasoning",
            min=0,
            max=1,
            help="Share of conversations whose reasoning is cut off.",
        ),
    ] = 0.0

    def read(self) -> "ChatOptions | None":
        """Return how conversations are written; None where rows are plain text.

        Raises:
            UserError: when both shares exceed 1 together, or an option lacks `--chat`.
        """
        from nemotron.data.config import ChatOptions
        from nemotron.errors import UserError

        if self.reasoning_off_rate + self.reasoning_budget_rate > 1:
            raise UserError("exceed 1; lower one.", key="--no-reasoning and --cut-reasoning")
        options = ChatOptions(
            messages_column=self.messages,
            tools_column=self.tools,
            enable_thinking=self.thinking,
            truncate_history_thinking=not self.all_thinking,
            reasoning_off_rate=self.reasoning_off_rate,
            reasoning_budget_rate=self.reasoning_budget_rate,
        )
        if self.chat:
            return options
        if changed := list(options.model_dump(exclude_defaults=True)):
            raise UserError("goes with --chat; give it, too.", key=OPTION_NAMES[changed[0]])
        return None
