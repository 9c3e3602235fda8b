"""Write the embedded task "museums": facts about a place to sentences that state them.

A context has a name, a kind and two to five more facts. A reference states all of them: an opening
sentence with the kind and one or two facts, then the rest, each in one of several wordings, now and
then two in one sentence. No name of one split occurs in another. See README.md.

    python -m examples.data.embedded.museums.make    # rewrites train.txt, valid.txt and test.txt
"""

from __future__ import annotations

import random
from pathlib import Path

SEED = 7
REFERENCES = 3
SIZES = {"train": 300, "valid": 40, "test": 40}  # contexts

FIRST = """Lantern Copper Mill Anchor Rose Heron Miller's Bell Garden Orchard Salt Silver Stone
Harvest Swan River Candle Thistle Weaver's Bishop's""".split()
LAST = "House Hall Rooms Court Gate Yard Cottage Tower Lodge Barn".split()
KINDS = ("museum", "gallery", "library", "workshop", "reading room")
# A fact and its wordings: in the opening sentence, and as sentences of their own.
SHOWS = """clocks|old ships|portraits|maps|coins|bells|glass|fans|letters|stuffed birds|carved
chairs|musical boxes|tools of the farm|dresses of silk|swords""".replace("\n", " ").split("|")
NEAR = """the harbour|the old bridge|the market|the castle|the river|the station|the church|
the town wall|the school|the park""".replace("\n", "").split("|")
SHOWING = (
    ("with {}", "that shows {}", "full of {}"),
    ("It shows {}.", "You can see {} there.", "People come here to look at {}."),
)
STANDING = (
    ("near {}", "not far from {}", "close to {}"),
    ("It stands near {}.", "You will find it close to {}.", "It is not far from {}."),
)
PRICES = {
    "free": ("Entry is free.", "It costs nothing to go in.", "You need not pay."),
    "cheap": ("Tickets are cheap.", "It costs little to go in.", "You pay very little."),
    "high": ("Tickets cost much.", "It costs a good deal to go in.", "The price is high."),
}
OPENS = {
    "every day": ("It is open every day.", "You can visit it on any day."),
    "at weekends": ("It is open at weekends only.", "You can visit it on Saturday and Sunday."),
    "in summer": ("It is open in summer only.", "It is closed in winter."),
}
CHILDREN = {
    "yes": ("Children are welcome.", "It is a good place for children.", "Families will like it."),
    "no": ("It is not a place for children.", "Children will not like it."),
}
STATED = {"price": PRICES, "opens": OPENS, "children": CHILDREN}
ADJECTIVES = {"free": "free", "cheap": "cheap"}
TOGETHER = 0.4  # how often two of the later facts share a sentence


def facts(name: str, draw: random.Random) -> dict[str, str]:
    """A context: field -> value."""
    found = {"name": name, "kind": draw.choice(KINDS), "shows": draw.choice(SHOWS)}
    more = {
        "price": draw.choice(list(PRICES)),
        "opens": draw.choice(list(OPENS)),
        "near": draw.choice(NEAR),
        "children": draw.choice(list(CHILDREN)),
    }
    kept = draw.sample(list(more), draw.choice((1, 2, 2, 3, 3, 4)))
    return found | {field: value for field, value in more.items() if field in kept}


def text(given: dict[str, str], draw: random.Random) -> str:
    """One way to say it."""
    rest = {field: value for field, value in given.items() if field not in ("name", "kind")}
    kind = given["kind"]
    if rest.get("price") in ADJECTIVES and draw.random() < 0.4:
        kind = f"{ADJECTIVES[rest.pop('price')]} {kind}"
    parts = []
    for field, (wordings, _) in (("shows", SHOWING), ("near", STANDING)):
        if field in rest and draw.random() < 0.6:
            parts.append(draw.choice(wordings).format(rest.pop(field)))
    draw.shuffle(parts)
    sentences = [" ".join([given["name"], "is a", kind, *parts]) + "."]
    later = [_sentence(field, value, draw) for field, value in rest.items()]
    draw.shuffle(later)
    while later:
        sentence = later.pop(0)
        if later and draw.random() < TOGETHER:
            second = later.pop(0)
            sentence = f"{sentence[:-1]}, and {second[0].lower()}{second[1:]}"
        sentences.append(sentence)
    return " ".join(sentences)


def _sentence(field: str, value: str, draw: random.Random) -> str:
    if field == "shows":
        return draw.choice(SHOWING[1]).format(value)
    if field == "near":
        return draw.choice(STANDING[1]).format(value)
    return draw.choice(STATED[field][value])


def lines(names: list[str], draw: random.Random) -> list[str]:
    """`name : … | kind : …||text`, as E2E's files have it; a context's references in turn."""
    rows = []
    for name in names:
        given = facts(name, draw)
        context = " | ".join(f"{field} : {value}" for field, value in given.items())
        texts: list[str] = []
        while len(texts) < REFERENCES:
            reference = text(given, draw)
            if reference not in texts:
                texts.append(reference)
        rows += [f"{context}||{reference}\n" for reference in texts]
    return rows


def write(folder: Path, seed: int = SEED) -> None:
    """Write every split."""
    draw = random.Random(seed)
    names = [f"The {first} {last}" for first in FIRST for last in LAST]
    draw.shuffle(names)
    held_out = SIZES["valid"] + SIZES["test"]
    own = {
        "train": [draw.choice(names[held_out:]) for _ in range(SIZES["train"])],
        "valid": names[: SIZES["valid"]],
        "test": names[SIZES["valid"] : held_out],
    }
    for split, chosen in own.items():
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines(chosen, draw))


if __name__ == "__main__":
    write(Path(__file__).parent)
