"""Write the embedded task "wording": do two sentences say the same in other words?

The second sentence of a pair replaces every content word of the first: by synonyms throughout
(label 1), or by synonyms but for one word, which comes from another concept of its kind (label 0).
Every word is as frequent under one label as under the other, so a bag-of-words classifier stays at
chance; what decides is which words of the two sentences correspond. See README.md.

    python -m examples.data.embedded.make            # rewrites train.jsonl and validation.jsonl
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 20
SIZES = {"train": 2400, "validation": 400}

# one concept per line, its words separated by "/"; a concept never borrows another one's word
PEOPLE = """doctor/physician
lawyer/attorney
teacher/schoolteacher/instructor
boss/supervisor/manager
child/kid/youngster
thief/robber/burglar
soldier/trooper
sailor/mariner/seaman
writer/author/novelist
actor/performer
cook/chef
king/monarch
priest/clergyman
officer/policeman/cop
farmer/grower
professor/academic
student/pupil/schoolboy
neighbour/resident
pilot/aviator/flyer
reporter/journalist"""
DEEDS = """bought/purchased
sold/traded
fixed/repaired/mended
destroyed/demolished/wrecked
found/discovered/located
lost/misplaced
hid/concealed
cleaned/washed/scrubbed
examined/inspected/studied
stole/swiped/pinched
built/constructed/assembled
pulled/dragged/towed
photographed/filmed
painted/coloured
described/portrayed/depicted
wanted/desired
admired/praised/applauded
burned/torched
delivered/transported/shipped
hated/despised/loathed"""
THINGS = """car/automobile
house/home/dwelling
ship/vessel
road/street/avenue
picture/image
sofa/couch
rock/stone/boulder
bag/sack
coat/jacket
gun/weapon/firearm
shop/store
cup/mug
forest/woods/woodland
gift/present
film/movie
bicycle/bike
rug/carpet
machine/device/apparatus
book/volume
medicine/drug/medication"""
QUALITIES = """big/large/huge
small/tiny/little
old/ancient/aged
new/modern/recent
beautiful/pretty/lovely
ugly/hideous/unsightly
costly/expensive/pricey
cheap/inexpensive/affordable
dirty/filthy/grimy
strange/odd/weird
famous/renowned/celebrated
empty/vacant
broken/damaged
dangerous/hazardous/unsafe"""
FORM = "The {people} {deeds} the {qualities} {things}."
LEXICON = {
    kind: [line.split("/") for line in concepts.splitlines()]
    for kind, concepts in (
        ("people", PEOPLE),
        ("deeds", DEEDS),
        ("qualities", QUALITIES),
        ("things", THINGS),
    )
}


def pairs(count: int, draw: random.Random, seen: set[str]) -> list[dict]:
    """`count` rows, as many of each label; no sentence of `seen` is used again."""
    rows: list[dict] = []
    while len(rows) < count:
        label = len(rows) % 2
        first, second = {}, {}
        changed = draw.choice(list(LEXICON))
        for kind, concepts in LEXICON.items():
            concept, other = draw.sample(concepts, 2)
            first[kind], second[kind] = draw.sample(concept, 2)
            if label == 0 and kind == changed:
                second[kind] = draw.choice(other)
        opening, closing = FORM.format(**first), FORM.format(**second)
        if opening in seen or closing in seen:
            continue
        seen.update((opening, closing))
        rows.append({"sentence1": opening, "sentence2": closing, "label": label})
    draw.shuffle(rows)
    return rows


def write(folder: Path, seed: int = SEED) -> None:
    """Write every split as JSON lines; no sentence occurs twice."""
    draw, seen = random.Random(seed), set()
    for split, count in SIZES.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in pairs(count, draw, seen))


if __name__ == "__main__":
    write(Path(__file__).parent)
