"""Compose system prompts from seeded values: support bots, schemas, glossaries, personas, formats, rules, tutors.

Place in the flow: values -> **prompts** -> data. Each prompt comes with inputs that are about it, so that a gist which
loses its names and numbers is seen to lose them.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from benchmarks.adapter import values as lists
from benchmarks.adapter.questions import INSTRUCTIONS, PASSAGES, QUESTIONS
from benchmarks.adapter.values import Values

__all__ = ["Composed", "compose", "compose_instruction", "ordinary", "passages"]


class Composed(NamedTuple):
    """A prompt and inputs that are about it.

    Args:
        kind: what it was composed as.
        prompt: its text.
        inputs: inputs about it.
    """

    kind: str
    prompt: str
    inputs: list[str]


def _support(draw: Values) -> Composed:
    kind, items = draw.one(lists.GOODS)
    name, city, bot = draw.one(lists.LAST_NAMES), draw.one(lists.CITIES), draw.one(lists.FIRST_NAMES)
    chosen = draw.random.sample(items, draw.random.randint(2, len(items)))
    prices = {item: draw.price(4, 900) for item in chosen}
    days, back = draw.random.choice([10, 14, 21, 30, 45, 60, 90]), draw.price(5, 40)
    facts = [
        f"Returns are accepted within {days} days with the receipt; the refund takes {draw.random.randint(3, 12)} "
        "days.",
        f"Shipping is free from {back}; otherwise it costs {draw.price(2, 12)} and takes {draw.random.randint(2, 9)} "
        "days.",
        f"The shop is open {draw.hours()}.",
        f"The guarantee lasts {draw.random.randint(1, 6)} years.",
        f"For anything else, customers can call {draw.phone()} or write to help@{name.lower()}.example.",
        f"Members of the {draw.one(lists.WORDS)} Club get {draw.random.choice([5, 10, 15, 20])} % off.",
        f"The owner is {draw.person()}.",
        "Never promise a delivery date.",
        f"If a customer is angry, offer a voucher of {draw.price(3, 25)}.",
    ]
    draw.random.shuffle(facts)
    facts = facts[: draw.random.randint(2, len(facts))]
    price_list = "; ".join(f"{item}: {price}" for item, price in prices.items())
    prompt = draw.random.choice(
        [
            f"You are {bot}, the support assistant of {name} {kind.title()} in {city}. Be {draw.one(lists.TONES)}. "
            f"Prices: {price_list}. {' '.join(facts)}",
            f"You answer questions from customers of {name}, a shop for {kind} in {city}.\n\nPrices\n"
            + "\n".join(f"- {item}: {price}" for item, price in prices.items())
            + "\n\nPolicies\n"
            + "\n".join(f"- {fact}" for fact in facts),
            f"Company: {name} ({kind}), {city}. Your name: {bot}. Style: {draw.one(lists.TONES)}.\n{' '.join(facts)}\n"
            f"Price list: {price_list}.",
        ]
    )
    asked = [
        f"How much is the {draw.random.choice(chosen)}?",
        "Can I send something back?",
        "How much is shipping?",
        "When are you open?",
        "How can I reach you?",
        "Where are you?",
        f"Which is cheaper, the {chosen[0]} or the {chosen[-1]}?",
        "I am really angry, my order is late!",
        "What do you sell?",
        "Do you have a discount for me?",
        "Who owns the shop?",
        "How long is the guarantee?",
    ]
    return Composed("support", prompt, asked)


def _service(draw: Values) -> Composed:
    kind, items = draw.one(lists.SERVICES)
    name, city, person = draw.one(lists.LAST_NAMES), draw.one(lists.CITIES), draw.person()
    chosen = draw.random.sample(items, draw.random.randint(2, len(items)))
    lines = [f"{item}: {draw.price(8, 240)}, {draw.random.choice([15, 20, 30, 45, 60, 90])} minutes" for item in chosen]
    facts = [
        f"Opening hours: {draw.hours()}.",
        f"Appointments can be cancelled free of charge up to {draw.random.choice([2, 12, 24, 48])} hours before.",
        f"The address is {draw.random.randint(1, 140)} {draw.one(lists.LAST_NAMES)} Street.",
        f"Parking is {draw.random.choice(['free', 'behind the house', 'not available', 'two euros an hour'])}.",
        f"New customers fill in a form and bring {draw.random.choice(['an identity card', 'their insurance card'])}.",
        f"Payment: {draw.random.choice(['cash only', 'card or cash', 'by invoice', 'card only'])}.",
        f"On public holidays call {draw.phone()}.",
    ]
    draw.random.shuffle(facts)
    facts = facts[: draw.random.randint(1, len(facts))]
    prompt = draw.random.choice(
        [
            f"You are the receptionist of {kind} in {city}, run by {person}. You are {draw.one(lists.TONES)}. "
            f"Services: {'; '.join(lines)}. {' '.join(facts)} Ask for the name and the day before you book.",
            f"{name} is {kind} in {city}. You take bookings by chat.\n"
            + "\n".join(f"* {line}" for line in lines)
            + "\n"
            + "\n".join(facts),
        ]
    )
    asked = [
        f"I would like a {draw.random.choice(chosen)}.",
        f"What does a {draw.random.choice(chosen)} cost and how long does it take?",
        "Can I come on Sunday?",
        "I have to cancel my appointment.",
        "Where can I park?",
        "How do I pay?",
        "What services do you offer?",
        "Who runs the place?",
        "What should I bring?",
    ]
    return Composed("service", prompt, asked)


def _sql(draw: Values) -> Composed:
    tables = draw.some(lists.TABLES, 1, 4)
    dialect = draw.random.choice(["PostgreSQL", "SQLite", "MySQL"])
    kinds = {"id": "integer", "name": "text"}
    typed = [
        (name, ", ".join(f"{c} {kinds.get(c) or draw.random.choice(['text', 'integer', 'date'])}" for c in columns))
        for name, columns in tables
    ]
    schema = draw.random.choice(
        [
            "\n".join(f"CREATE TABLE {name} ({columns});" for name, columns in typed),
            "\n".join(f"- {name}: {', '.join(columns)}" for name, columns in tables),
        ]
    )
    rules = draw.random.sample(
        [
            "Answer with one SQL statement and nothing else.",
            "Never change data; only SELECT is allowed.",
            f"Limit every result to {draw.random.choice([5, 10, 50, 100])} rows.",
            "Write keywords in capitals.",
            "Explain the statement in one sentence.",
            "If a column does not exist, say so.",
            "Use short aliases for tables.",
        ],
        draw.random.randint(1, 4),
    )
    prompt = f"You write {dialect} for this database.\n{schema}\n{' '.join(rules)}"
    (name, columns), (other, fields) = tables[0], tables[-1]
    asked = [
        f"How many {name} are there?",
        f"Show the {columns[1]} of all {name}.",
        f"Show the newest {other}.",
        f"List {other} sorted by {fields[2]}.",
        f"Which {name} have no {columns[3]}?",
        f"Count {other} by {fields[3]}.",
        f"Delete all {name}.",
        "Which tables are there?",
        f"What is the average {fields[2]} of {other}?",
    ]
    return Composed("sql", prompt, asked)


def _glossary(draw: Values) -> Composed:
    terms = draw.some(lists.GLOSSARY, 3, 12)
    company, language = draw.one(lists.LAST_NAMES), draw.one(lists.LANGUAGES)
    pairs = draw.random.choice(["; ".join(f"{a} = {b}" for a, b in terms), "\n".join(f"{a} -> {b}" for a, b in terms)])
    prompt = draw.random.choice(
        [
            f"You edit texts for {company}. Replace the words on the left with the words on the right:\n{pairs}\n"
            f"Keep everything else as it is. Be {draw.one(lists.TONES)}.",
            f"Glossary of {company}:\n{pairs}\nRewrite what the user writes with these terms, and answer questions "
            f"about them. Write {draw.random.choice(['British', 'American'])} English.",
            f"You translate from English into {language}. Before that, replace these terms: {pairs}. Give only the "
            "translation.",
        ]
    )
    first, last = terms[0], terms[-1]
    asked = [
        f"The {first[0]} is ready, but the {last[0]} is not.",
        f"Please send the {first[0]} to the {last[0]} before Monday.",
        f"What do we say instead of {last[0]}?",
        "Which terms do you know?",
        f"Our {terms[len(terms) // 2][0]} needs a new {first[0]}.",
        "I will be late today.",
        f"Is {first[1]} the right word?",
    ]
    return Composed("glossary", prompt, asked)


def _persona(draw: Values) -> Composed:
    who, themes, saying = draw.one(lists.PERSONAS)
    name, city = draw.person(), draw.one(lists.CITIES)
    details = [
        f"You often speak of {themes[0]} and {themes[1]}.",
        f"You were born in {city}.",
        f'You say "{saying}" at least once in every answer.',
        f"You dislike {draw.one(lists.DISLIKES)}.",
        f"You are {draw.random.randint(19, 88)} years old and have {draw.random.randint(1, 6)} "
        f"{draw.random.choice(['cats', 'brothers', 'boats', 'children', 'medals'])}.",
        "You never break character.",
        f'You call the user "{draw.one(lists.ADDRESSES)}".',
        f"Your speech is {draw.one(lists.TONES)}.",
        f"Your secret is that you are afraid of {themes[3]}.",
    ]
    draw.random.shuffle(details)
    details = details[: draw.random.randint(2, len(details))]
    prompt = draw.random.choice(
        [
            f"You are {name}, {who}. {' '.join(details)}",
            f"Play the role of {who} named {name}. {' '.join(details)} Keep answers under "
            f"{draw.random.choice([30, 50, 80])} words.",
            f"Character: {name}\nRole: {who}\n" + "\n".join(f"- {detail}" for detail in details),
        ]
    )
    asked = [
        "Who are you, and where do you come from?",
        f"What do you think about {themes[2]}?",
        "How old are you?",
        "What are you afraid of?",
        "Give me some advice for life.",
        "What did you do yesterday?",
        f"Tell me about {themes[0]}.",
        "Are you a computer program?",
    ]
    return Composed("persona", prompt, asked)


def _extract(draw: Values) -> Composed:
    what, names = draw.one(lists.FIELDS)
    chosen = draw.random.sample(names, draw.random.randint(2, len(names)))
    form = draw.random.choice(
        [
            "JSON with the keys " + ", ".join(f'"{name}"' for name in chosen),
            'one line for each of these fields, as in "field: value": ' + ", ".join(chosen),
            "a table with the columns " + " | ".join(chosen),
            "a list separated by semicolons, in this order: " + ", ".join(chosen),
            "YAML with the keys " + ", ".join(chosen),
        ]
    )
    extra = draw.random.sample(
        [
            "Write null for what is missing.",
            "Do not explain anything.",
            "Keep the spelling of the text.",
            "Write dates as year-month-day.",
            "Leave out what the text does not say.",
            "Use lower case.",
            "If the text is something else, answer only: not found.",
        ],
        draw.random.randint(1, 4),
    )
    prompt = f"You read {what} and answer with {form}. {' '.join(extra)}"
    asked = [
        *draw.random.sample(passages(draw.is_held_out), 6),
        "What do you need from me?",
        f"Here is {what}: {draw.person()}, {draw.one(lists.CITIES)}, {draw.price(10, 90)}, next Friday.",
    ]
    return Composed("extract", prompt, asked)


def _style(draw: Values) -> Composed:
    rules = draw.some(lists.RULES, 2, 8)
    filled = [
        rule.format(
            n=draw.random.randint(1, 5),
            word=draw.one(lists.WORDS),
            address=draw.one(lists.ADDRESSES),
            name=draw.one(lists.FIRST_NAMES),
        )
        for rule in rules
    ]
    opening = draw.random.choice(
        [
            f"You are a helpful assistant. Be {draw.one(lists.TONES)}.",
            f"You are {draw.one(lists.FIRST_NAMES)}, an assistant.",
            "Follow these rules:",
            f"You write for the newsletter of {draw.one(lists.LAST_NAMES)} in {draw.one(lists.CITIES)}.",
        ]
    )
    between = draw.random.choice([" ", "\n- "])
    prompt = opening + between + between.join(filled)
    return Composed("style", prompt, ["Who are you?", "Which rules do you follow?", "What is two plus two, and why?"])


def _tutor(draw: Values) -> Composed:
    who, topics = draw.one(lists.DOMAINS)
    chosen = draw.random.sample(topics, draw.random.randint(2, len(topics)))
    rules = [
        rule.format(
            n=draw.random.randint(1, 5),
            word=draw.one(lists.WORDS),
            address=draw.one(lists.ADDRESSES),
            name=draw.one(lists.FIRST_NAMES),
        )
        for rule in draw.some(lists.RULES, 1, 4)
    ]
    details = [
        f"You only talk about {', '.join(chosen)}; for anything else you name {draw.person()} as the one to ask.",
        f"Your pupils are {draw.random.choice(['children', 'adults', 'beginners', 'experts', 'pensioners'])}.",
        f"Lessons take place {draw.hours()} in room {draw.random.randint(1, 40)}.",
        f"You are {draw.one(lists.TONES)}.",
        "When someone is wrong, say first what was right about it.",
        f"Set a small task after every answer, worth {draw.random.randint(2, 20)} points.",
    ]
    draw.random.shuffle(details)
    prompt = f"You are {who}. {' '.join(details[: draw.random.randint(1, len(details))])} {' '.join(rules)}"
    asked = [
        f"Explain {chosen[0]}.",
        f"What should I know about {chosen[-1]}?",
        "I got it wrong again.",
        "What do you teach?",
        "Who can help me with something else?",
        "When is the next lesson?",
        "Give me a task.",
    ]
    return Composed("tutor", prompt, asked)


def _staff(draw: Values) -> Composed:
    company, city = draw.one(lists.LAST_NAMES), draw.one(lists.CITIES)
    facts = [
        f"Employees have {draw.random.randint(22, 34)} days of leave a year; requests go to {draw.person()}.",
        f"Expenses up to {draw.price(20, 90)} need no approval.",
        f"The canteen is open from 11:{draw.random.choice(['00', '30'])} to 14:00; today there is "
        f"{draw.random.choice(['lentil soup', 'fish and rice', 'pasta', 'curry', 'salad'])}.",
        f"The Wi-Fi is called {company}-{draw.random.randint(10, 99)}.",
        f"Who is ill calls {draw.phone()} before {draw.random.randint(7, 9)}:30.",
        f"Laptops are replaced every {draw.random.randint(2, 5)} years.",
        f"The fire drill is on {draw.random.randint(1, 28)} {draw.random.choice(['March', 'June', 'October'])}.",
        f"Working from home is allowed {draw.random.randint(1, 4)} days a week.",
        f"The head of IT is {draw.person()}, room {draw.random.randint(100, 480)}.",
        f"New colleagues get a mentor for {draw.random.randint(2, 8)} weeks.",
        "Salaries are not discussed here.",
    ]
    draw.random.shuffle(facts)
    facts = facts[: draw.random.randint(3, len(facts))]
    between = draw.random.choice([" ", "\n", "\n- "])
    prompt = (
        f"You are the help desk for employees of {company} in {city}. Be {draw.one(lists.TONES)}. Answer only from "
        f"this list:{between}{between.join(facts)}"
    )
    asked = [
        "How many days of leave do I have?",
        "I am ill. What do I do?",
        "What is for lunch?",
        "Who is the head of IT?",
        "Can I work from home tomorrow?",
        "My laptop is slow. Can I get a new one?",
        "What does my colleague earn?",
        "How do I get on the Wi-Fi?",
        "When is the fire drill?",
    ]
    return Composed("staff", prompt, asked)


def _handbook(draw: Values) -> Composed:
    first, second, third = draw.random.choice([_support, _service])(draw), _staff(draw), _style(draw)
    prompt = f"{first.prompt}\n\nFor colleagues who write to you\n{second.prompt}\n\nHow to answer\n{third.prompt}"
    return Composed("handbook", prompt, [*first.inputs, *second.inputs, *third.inputs[1:]])


def _several(draw: Values) -> Composed:
    makers = draw.random.sample([_support, _service, _persona, _glossary, _tutor, _extract, _sql], 2)
    parts = [make(draw) for make in makers]
    prompt = "You have two tasks.\n\n" + "\n\n".join(f"Task {n}. {one.prompt}" for n, one in enumerate(parts, 1))
    return Composed("several", prompt, [text for one in parts for text in one.inputs])


_KINDS: tuple[Callable[[Values], Composed], ...] = (
    _support, _service, _sql, _glossary, _persona, _extract, _style, _tutor, _staff, _handbook,
    _several, _support, _service, _staff, _handbook, _several,
)  # fmt: skip


def compose(number: int, seed: int, *, is_held_out: bool = False) -> list[Composed]:
    """Compose ``number`` different system prompts, the kinds in turn; those that are full of facts come twice as often.

    Args:
        number: how many.
        seed: seed of everything that is drawn.
        is_held_out: whether to use the values that training prompts never use.
    """
    draw = Values(Random(f"prompts {seed} {is_held_out}"), is_held_out=is_held_out)
    found: dict[str, Composed] = {}
    while len(found) < number:
        one = _KINDS[len(found) % len(_KINDS)](draw)
        found.setdefault(one.prompt, one)
    return list(found.values())


def compose_instruction(number: int, seed: int) -> list[Composed]:
    """Compose ``number`` short instructions that apply to a text; some occur several times with other words."""
    draw = Values(Random(f"instructions {seed}"), is_held_out=False)
    found: dict[str, Composed] = {}
    for place in range(20 * number):
        text = INSTRUCTIONS[place % len(INSTRUCTIONS)].format(
            n=draw.random.choice([3, 5, 8, 10, 12]),
            language=draw.one(lists.LANGUAGES),
            tone=draw.one(lists.TONES),
            city=draw.one(lists.CITIES),
            persona=draw.one(lists.PERSONAS)[0],
        )
        form = draw.random.choice(["{}", "{}", "You get a text. {}", "{} Do not explain your answer.", "Task: {}"])
        prompt = form.format(text)
        found.setdefault(prompt, Composed("instruction", prompt, draw.random.sample(passages(False), 8)))
        if len(found) == number:
            break
    return list(found.values())


def passages(is_held_out: bool) -> list[str]:
    """Return the short texts of a split."""
    return PASSAGES[-8:] if is_held_out else PASSAGES[:-8]


def ordinary(is_held_out: bool) -> list[str]:
    """Return the ordinary questions of a split: every fifth is held out."""
    return [text for place, text in enumerate(QUESTIONS) if (place % 5 == 4) == is_held_out]
