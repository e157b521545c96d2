"""What travels while a rank computes: the order in which it starts, computes and waits."""

from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from nemotron.model.moe import MoE
from nemotron.parallel.expert import AsyncCollective
from tests.support.layout_run import build, forget_groups
from tests.support.pool import Pool
from tests.support.tiny_run import do_step

pytestmark = pytest.mark.distributed

Event = tuple[str, str]


def on_the_way_back(tensors: Any, event: Event, happened: list[Event]) -> None:
    """Say when the gradient of the first tensor of a call or result is there."""
    first = tensors[0] if isinstance(tensors, tuple) else tensors
    first.register_hook(lambda _: happened.append(event))


def gathered(values: dict[str, Any]) -> list[Event]:
    """Do a step; return when weights of layers are gathered and their mixers compute."""
    trainer = build(values)
    happened: list[Event] = []
    names: dict[int, str] = {}
    for index, block in enumerate(trainer.local.roots[0].backbone.layers):
        name = str(index)
        names |= {id(module): name for module in block.modules()}

        def before(_: nn.Module, inputs: Any, name: str = name) -> None:
            on_the_way_back(inputs, ("back", name), happened)

        def after(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            happened.append(("computed", name))
            on_the_way_back(output, ("slope", name), happened)

        block.mixer.register_forward_pre_hook(before)
        block.mixer.register_forward_hook(after)
    unshard = FSDPParamGroup.unshard

    def gather(group: FSDPParamGroup, async_op: bool = False) -> None:
        found = {names[id(module)] for module in group.modules if id(module) in names}
        happened.extend(("gather", name) for name in found)
        unshard(group, async_op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPParamGroup, "unshard", gather)
        do_step(trainer, 0)
    forget_groups(trainer)
    return happened


def sent(values: dict[str, Any]) -> list[list[Event]]:
    """Do a step; return for each layer of experts when tokens travel and when it computes."""
    trainer = build(values)
    happened: list[Event] = []
    for module in trainer.local.roots[0].backbone.modules():
        if isinstance(module, MoE):
            shared = module.shared_experts
            shared.up_proj.register_forward_hook(
                lambda _, inputs, y: on_the_way_back(y, ("shared", "back"), happened)
            )
            shared.register_forward_hook(lambda *_: happened.append(("shared", "there")))
    launch, wait = AsyncCollective.launch, AsyncCollective.wait

    def launched(self: AsyncCollective, collective: Any, x: Tensor) -> None:
        happened.append(("launch", "there" if collective is self.forward else "back"))
        launch(self, collective, x)

    def waited(self: AsyncCollective) -> Tensor:
        happened.append(("wait", ""))
        return wait(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncCollective, "launch", launched)
        patch.setattr(AsyncCollective, "wait", waited)
        do_step(trainer, 0)
    forget_groups(trainer)
    return happened


def test_weights_of_the_next_two_layers_are_gathered_before_one_has_computed(
    pair: Pool, values: dict[str, Any]
):
    for happened in pair.run(gathered, values | {"parallel": {}}):
        computed = [event for event in happened if event[0] == "computed"]
        assert computed[:4] == [("computed", str(index)) for index in range(4)]
        for index, ahead in ((0, 1), (0, 2), (1, 3), (2, 3)):
            following = happened.index(("gather", str(ahead)))
            assert following < happened.index(("computed", str(index))), (index, ahead)
        # and on the way back, those of the layers before it
        there = max(happened.index(event) for event in computed[:4])
        for index, ahead in ((3, 2), (3, 1), (2, 0), (1, 0)):
            earlier = happened.index(("gather", str(ahead)), there)
            assert earlier < happened.index(("back", str(index)), there), (index, ahead)


@pytest.mark.parametrize("method", ["all_gather", "all_to_all"])
def test_the_shared_expert_computes_while_tokens_travel_there_and_back(
    pair: Pool, values: dict[str, Any], method: str
):
    layout = {"ep": 2, "expert_dispatch": method}
    for happened in pair.run(sent, values | {"parallel": layout}):
        shared = [n for n, event in enumerate(happened) if event[0] == "shared"]
        assert shared
        for number in shared:
            way = happened[number][1]
            # started last before it, in its own direction, and waited for after it
            earlier = [e for e in happened[:number] if e[0] in ("launch", "wait")]
            assert earlier[-1] == ("launch", way)
            later = [e for e in happened[number:] if e[0] in ("launch", "wait")]
            assert later[0] == ("wait", "")
