"""Small labelled tasks for in-context learning, made from word lists of our own.

Every task is a list of (text, label) with a label word each: 1,600 examples, the same on
every machine. They are easy for a person and learnable from a few demonstrations; being made from
templates they are poorer than natural text, which any Hugging Face dataset given by name is for.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

# examples a task is cut to, drawn evenly over its labels
N_EXAMPLES = 1600


@dataclasses.dataclass(frozen=True)
class Task:
    """Texts and labels.

    Attributes:
        name: the name of the task.
        text_name, label_name: what stands before the text and before the label in a prompt.
        examples: (text, label).
    """

    name: str
    text_name: str
    label_name: str
    examples: tuple[tuple[str, str], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The label words, sorted."""
        return tuple(sorted({label for _, label in self.examples}))

    def show(self, text: str, label: str | None = None) -> str:
        """One demonstration, or the question where there is no label."""
        answer = "" if label is None else f" {label}\n\n"
        return f"{self.text_name}: {text}\n{self.label_name}:{answer}"


_THINGS = (
    "film", "novel", "concert", "restaurant", "hotel", "phone", "camera", "lecture", "bakery",
    "museum", "train ride", "garden tour", "comedy show", "coat", "headset", "board game",
)  # fmt: skip
_PRAISE = (
    "was a delight from start to finish", "left us smiling all evening", "is worth every penny",
    "exceeded what we had hoped for", "was charming and well made", "deserves all its praise",
    "made my whole week better", "could hardly have been nicer", "was warm, clever and fun",
    "is the best I have come across in years", "worked perfectly and looked lovely",
    "won me over within minutes",
)  # fmt: skip
_OPENINGS = ("", "Honestly, ", "In short, ", "My sister says ", "As everyone agreed, ")
_BLAME = (
    "was a waste of money", "bored us to tears", "fell apart within a day",
    "was far worse than expected", "left a bitter taste", "was rude, slow and overpriced",
    "is the worst I have come across in years", "ruined the whole evening",
    "was clumsy and badly made", "disappointed everybody at our table",
    "made me want to ask for a refund", "felt endless and pointless",
)  # fmt: skip

_KINDS: dict[str, tuple[str, ...]] = {
    "animal": (
        "otter", "sparrow", "badger", "salmon", "giraffe", "hedgehog", "lizard", "goat", "owl",
        "squirrel", "dolphin", "moth", "falcon", "mule", "toad", "lynx", "crab", "heron", "beaver",
        "antelope",
    ),
    "food": (
        "omelette", "lentil soup", "cheese", "porridge", "apricot", "noodles", "bread", "cabbage",
        "pancake", "yogurt", "rice pudding", "olive", "dumpling", "honey", "walnut", "pickle",
        "sausage", "mango", "waffle", "stew",
    ),
    "tool": (
        "hammer", "chisel", "wrench", "saw", "screwdriver", "pliers", "shovel", "drill", "rake",
        "crowbar", "file", "trowel", "axe", "clamp", "level", "sickle", "mallet", "tweezers",
        "hoe", "spanner",
    ),
    "vehicle": (
        "tram", "canoe", "lorry", "bicycle", "helicopter", "ferry", "scooter", "tractor",
        "minibus", "glider", "sailboat", "van", "locomotive", "motorcycle", "kayak", "taxi",
        "submarine", "wagon", "airship", "barge",
    ),
}  # fmt: skip
_SCENES = (
    "We saw the {} yesterday", "She drew the {} on the board", "Nobody noticed the {} at first",
    "He asked me about the {}", "The poem mentions the {}", "They talked about the {} all day",
    "I dreamt of the {} again", "The child pointed at the {}", "Someone took a photo of the {}",
    "There is a picture of the {} on the wall", "We had read about the {} before",
    "Her story begins with the {}", "The prize was named after the {}", "He could not find the {}",
    "The article described the {} in detail", "I forgot to mention the {}",
    "They had never come across the {} until then", "The {} was in the news",
    "My uncle told us about the {}", "The riddle was about the {}", "We waited for the {}",
    "The whole village knew the {}", "She remembered the {} well", "The film opens with the {}",
)  # fmt: skip

_PEOPLE = ("engineer", "queen", "painter", "sailor", "composer", "doctor", "goalkeeper", "baker")
_DEEDS = (
    "built the old bridge", "wrote that song", "opened the first shop", "won the final race",
    "found the lost map", "designed the town hall", "planted the orchard", "led the expedition",
    "repaired the clock tower",
)  # fmt: skip
_EVENTS = (
    "the summer fair", "the school play", "the harvest market", "the chess final",
    "the boat race", "the spring concert", "the night train", "the council meeting",
    "the poetry evening", "the flea market", "the bicycle tour", "the charity dinner",
)  # fmt: skip
_STUFF = (
    "eggs", "windows", "chairs", "islands", "students", "bricks", "letters", "bridges", "coins",
    "lamps", "apples", "boats",
)  # fmt: skip
_ENDINGS = ("", " this year", ", as far as you know", ", according to the guide", ", after all",
            ", by the way")  # fmt: skip
_PLACES = ("the basket", "the tower", "this lake", "the village", "the hall", "that album")

_WHO = ("my neighbour", "the pilot", "our teacher", "the twins", "the old gardener", "a stranger")
_ACTS: tuple[tuple[str, str, str], ...] = (
    ("walked to the harbour", "walks to the harbour", "will walk to the harbour"),
    ("painted the fence", "paints the fence", "will paint the fence"),
    ("sold the piano", "sells the piano", "will sell the piano"),
    ("wrote a long letter", "writes a long letter", "will write a long letter"),
    ("cooked for everyone", "cooks for everyone", "will cook for everyone"),
    ("swam across the bay", "swims across the bay", "will swim across the bay"),
    ("fixed the radio", "fixes the radio", "will fix the radio"),
    ("bought fresh bread", "buys fresh bread", "will buy fresh bread"),
    ("sang in the choir", "sings in the choir", "will sing in the choir"),
    ("moved to the coast", "moves to the coast", "will move to the coast"),
    ("drew a map", "draws a map", "will draw a map"),
    ("kept the secret", "keeps the secret", "will keep the secret"),
)
_TAILS = ("", " with a friend", " in the rain", " without a word", " before lunch",
          " against all advice", " to everyone's surprise", " as a favour", " for a good reason",
          )  # fmt: skip


def _sentiment() -> list[tuple[str, str]]:
    found = [
        (f"{opening}the {thing} {verdict}.", label)
        for label, verdicts in (("positive", _PRAISE), ("negative", _BLAME))
        for thing in _THINGS
        for verdict in verdicts
        for opening in _OPENINGS
    ]
    return [(text[0].upper() + text[1:], label) for text, label in found]


def _category() -> list[tuple[str, str]]:
    return [
        (scene.format(word) + ".", kind)
        for kind, words in _KINDS.items()
        for word in words
        for scene in _SCENES
    ]


def _question() -> list[tuple[str, str]]:
    found = [(f"Which {person} {deed}", "person") for person in _PEOPLE for deed in _DEEDS]
    found += [(f"Who {deed}", "person") for deed in _DEEDS]
    found += [(f"How many {stuff} are in {place}", "number") for stuff in _STUFF
              for place in _PLACES]  # fmt: skip
    for event in _EVENTS:
        for how in ("starts", "ends", "was cancelled", "is announced", "takes place", "is over"):
            found += [(f"When do we hear whether {event} {how}", "time")]
        for how in ("held", "announced", "moved to", "prepared", "advertised", "filmed"):
            found += [(f"Where is {event} {how}", "place")]
    return [(f"{text}{ending}?", label) for text, label in found for ending in _ENDINGS]


def _tense() -> list[tuple[str, str]]:
    return [
        (f"{who.capitalize()} {act}{tail}.", label)
        for who in _WHO[:3] + _WHO[4:]
        for acts in _ACTS
        for act, label in zip(acts, ("past", "present", "future"), strict=True)
        for tail in _TAILS
    ]


_MAKERS: dict[str, tuple[str, str, Callable[[], list[tuple[str, str]]]]] = {
    "sentiment": ("Review", "Sentiment", _sentiment),
    "category": ("Sentence", "Topic", _category),
    "question": ("Question", "Answer type", _question),
    "tense": ("Sentence", "Tense", _tense),
}
TASKS = tuple(_MAKERS)


def load_task(name: str) -> Task:
    """One of :data:`TASKS`, its examples in a fixed random order.

    Raises:
        ValueError: no such task.
    """
    if name not in _MAKERS:
        raise ValueError(f"name must be one of {', '.join(TASKS)}; got {name!r}")
    text_name, label_name, make = _MAKERS[name]
    return Task(name, text_name, label_name, tuple(_even(make(), N_EXAMPLES)))


def task_from_dataset(
    name: str,
    rows: Sequence[dict[str, Any]],
    *,
    text_column: str,
    label_column: str,
    label_names: Sequence[str] | None = None,
    n_examples: int = N_EXAMPLES,
    max_characters: int = 300,
) -> Task:
    """A task of rows of any dataset.

    Args:
        name: the name of the task.
        rows: dicts, such as those of a Hugging Face dataset.
        label_names: words for integer labels; None: the labels as they are written.
        max_characters: longer texts are left out.

    Raises:
        ValueError: a column is missing, or fewer than two labels or 20 examples remain.
    """
    found = []
    for row in rows:
        for column in (text_column, label_column):
            if column not in row:
                raise ValueError(
                    f"column {column!r} is not in the dataset: it has {', '.join(row)}"
                )
        label = row[label_column]
        word = label_names[int(label)] if label_names is not None else str(label)
        text = " ".join(str(row[text_column]).split())
        if text and len(text) <= max_characters:
            found.append((text, word.replace("_", " ")))
    task = Task(name, "Text", "Label", tuple(_even(found, n_examples)))
    if len(task.labels) < 2 or len(task.examples) < 20:
        raise ValueError(
            f"dataset must give at least 2 labels and 20 texts of at most {max_characters} "
            f"characters; got {len(task.labels)} and {len(task.examples)}"
        )
    return task


def _even(examples: list[tuple[str, str]], n: int) -> list[tuple[str, str]]:
    """At most n examples, about as many of every label, in a fixed random order."""
    draw = random.Random(0)
    by_label: dict[str, list[tuple[str, str]]] = {}
    for example in dict.fromkeys(examples):
        by_label.setdefault(example[1], []).append(example)
    for group in by_label.values():
        draw.shuffle(group)
    each = -(-n // max(len(by_label), 1))
    kept = [example for group in by_label.values() for example in group[:each]]
    draw.shuffle(kept)
    return kept[:n]
