"""Random offices, and jobs to do in them with the calls that do each."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemotron.posttrain.environments.calculator import evaluate, render
from nemotron.posttrain.environments.desk import OWN_ADDRESS, Tables
from nemotron.posttrain.environments.words import FIRST_NAMES, ITEMS, NOUNS

TOPICS = ("budget", "contract", "holiday", "invoice", "meeting", "report", "travel", "workshop")


@dataclass(frozen=True)
class Job:
    """A request, and what fulfills it."""

    text: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Name and arguments of each call that changes the tables."""
    answer: str | None = None
    """A number that the final message has to contain."""


def make_tables(rng: random.Random, size: int) -> Tables:
    """Return tables of `size` rows each, in which every subject, title and order is unique."""
    names = rng.choices(FIRST_NAMES, k=size)
    nouns = rng.sample(NOUNS, 2 * size)
    pairs = rng.sample([(n, i) for n in FIRST_NAMES[:8] for i in ITEMS[:8]], size)
    email = [
        {
            "id": number + 1,
            "sender": f"{names[number].lower()}@mail.example",
            "recipient": OWN_ADDRESS,
            "subject": f"{nouns[number]} {rng.choice(TOPICS)}",
            "body": f"About the {nouns[number]}.",
            "folder": "inbox",
        }
        for number in range(size)
    ]
    calendar = [
        {
            "id": number + 1,
            "title": f"{nouns[size + number]} {rng.choice(TOPICS)}",
            "start": _start(rng),
            "minutes": rng.choice((15, 30, 45, 60, 90)),
        }
        for number in range(size)
    ]
    orders = [
        {
            "id": number + 1,
            "customer": customer,
            "item": item,
            "quantity": rng.randint(1, 9),
            "price": rng.randint(100, 9900) / 100,
            "status": "open",
        }
        for number, (customer, item) in enumerate(pairs)
    ]
    return {"email": email, "calendar": calendar, "orders": orders}


def make_jobs(rng: random.Random, tables: Tables, level: int) -> list[Job]:
    """Return `1 + level // 2` jobs that touch different rows, at most one with an answer."""
    makers = list(EASY if level < 1 else EASY + HARD)
    jobs: list[Job] = []
    for maker in rng.sample(makers, min(1 + level // 2, len(makers))):
        if not (maker in ASKING and any(job.answer is not None for job in jobs)):
            jobs.append(maker(rng, tables))
    return jobs


def _start(rng: random.Random) -> str:
    day = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return f"{day} {rng.randint(8, 17):02}:{rng.choice((0, 15, 30, 45)):02}"


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def _calculate(rng: random.Random, tables: Tables) -> Job:
    a, b, c, d = (rng.randint(12, 999) for _ in range(4))
    expression = rng.choice((f"{a} * {b} + {c}", f"({a} + {b}) * {c} - {d}", f"{a} * {b} - {c}"))
    return Job(f"Compute {expression}.", answer=render(evaluate(expression)))


def _send(rng: random.Random, tables: Tables) -> Job:
    recipient = f"{rng.choice(FIRST_NAMES).lower()}@mail.example"
    topic, noun = rng.choice(TOPICS), rng.choice(NOUNS)
    body = f"The {topic} about the {noun} is ready."
    text = f'Send an e-mail to {recipient} with the subject "{topic}" and the body "{body}"'
    return Job(text, [_call("send_email", recipient=recipient, subject=topic, body=body)])


def _create(rng: random.Random, tables: Tables) -> Job:
    title, start, minutes = f"{rng.choice(TOPICS)} call", _start(rng), rng.choice((20, 40, 50))
    text = f'Create the event "{title}" of {minutes} minutes, which starts at {start}.'
    return Job(text, [_call("create_event", title=title, start=start, minutes=minutes)])


def _cancel(rng: random.Random, tables: Tables) -> Job:
    # moved events are in the second half, cancelled ones in the first
    half = tables["calendar"][: len(tables["calendar"]) // 2]
    event = rng.choice(half)
    return Job(f'Cancel the event "{event["title"]}".', [_call("cancel_event", id=event["id"])])


def _move(rng: random.Random, tables: Tables) -> Job:
    half = tables["calendar"][len(tables["calendar"]) // 2 :]
    event, start = rng.choice(half), _start(rng)
    text = f'Move the event "{event["title"]}" to {start}.'
    return Job(text, [_call("move_event", id=event["id"], start=start)])


def _archive(rng: random.Random, tables: Tables) -> Job:
    email, folder = rng.choice(tables["email"]), rng.choice(("archive", "spam"))
    text = f'Move the e-mail "{email["subject"]}" to the folder {folder}.'
    return Job(text, [_call("move_email", id=email["id"], folder=folder)])


def _ship(rng: random.Random, tables: Tables) -> Job:
    order, status = rng.choice(tables["orders"]), rng.choice(("paid", "shipped", "cancelled"))
    text = f"Set the {order['item']} order of {order['customer']} to {status}."
    return Job(text, [_call("set_order_status", id=order["id"], status=status)])


def _total(rng: random.Random, tables: Tables) -> Job:
    """Ask what a customer's orders cost, before any other job changes them."""
    customer = rng.choice(tables["orders"])["customer"]
    text = f"What did all orders of {customer} cost together before any of your changes?"
    return Job(text, answer=_cost(tables, customer))


def _bill(rng: random.Random, tables: Tables) -> Job:
    """Ask for an e-mail with a total."""
    customer = rng.choice(tables["orders"])["customer"]
    recipient, cost = f"{customer.lower()}@mail.example", _cost(tables, customer)
    text = (
        f'Send an e-mail to {recipient} with the subject "bill", whose body is only the number '
        f"that all orders of {customer} cost together before any of your changes."
    )
    return Job(text, [_call("send_email", recipient=recipient, subject="bill", body=cost)])


def _cost(tables: Tables, customer: str) -> str:
    own = [row for row in tables["orders"] if row["customer"] == customer]
    return render(evaluate(" + ".join(f"{row['quantity']} * {row['price']}" for row in own)))


EASY: tuple[Callable[[random.Random, Tables], Job], ...] = (_calculate, _send, _create)
HARD: tuple[Callable[[random.Random, Tables], Job], ...] = (
    _cancel,
    _move,
    _archive,
    _ship,
    _total,
    _bill,
)
ASKING = (_calculate, _total)
