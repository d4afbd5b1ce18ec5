"""The polls that the `seed` command asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from polls.models import Topic


@dataclass(frozen=True)
class Poll:
    """A question to seed.

    Args:
        topic: what it is about.
        text: the question.
        answers: each answer with its share of the votes, in any unit.
        detail: a sentence of context.
        open_days: days from publication until it closes; None for never.
        fresh: whether it was asked a moment ago, and nobody has voted yet.
    """

    topic: Topic
    text: str
    answers: dict[str, int]
    detail: str = ""
    open_days: int | None = None
    fresh: bool = False


# The newest first; neighbours are of different topics.
POLLS = (
    Poll(
        Topic.SCIENCE,
        "Which object in the night sky made you stop and look up?",
        {
            "The Moon, every single time": 44,
            "Saturn through a telescope": 27,
            "The Milky Way from somewhere dark": 38,
            "A comet": 11,
            "The space station going over": 14,
        },
        detail="The first time, or the time you remember best.",
    ),
    Poll(
        Topic.FOOD,
        "How do you take your coffee?",
        {"Black": 29, "Flat white": 33, "With oat milk": 18, "Espresso, standing up": 12, "I drink tea": 22},
        detail="The one you would order if nobody was listening.",
    ),
    Poll(
        Topic.CODE,
        "Tabs or spaces?",
        {"Spaces": 58, "Tabs": 31, "Whatever the formatter says": 64},
        detail="Asked once a decade, for the record.",
    ),
    Poll(
        Topic.PLAY,
        "Which board game starts the most arguments at your table?",
        {"Monopoly": 49, "Risk": 21, "Catan": 26, "Scrabble": 24, "Codenames": 9},
    ),
    Poll(
        Topic.PLACES,
        "Window seat or aisle?",
        {"Window": 61, "Aisle": 38, "I take the train": 27},
        detail="A flight of about three hours.",
    ),
    Poll(
        Topic.CULTURE,
        "You left a book half read. What happened?",
        {
            "A better book": 34,
            "Life": 29,
            "It never got going": 41,
            "I am still reading it, thank you": 23,
        },
        fresh=True,
    ),
    Poll(
        Topic.WORK,
        "What is the ideal length of a meeting?",
        {"15 minutes": 44, "25 minutes": 39, "An hour": 6, "It could have been an email": 57},
        open_days=9,
    ),
    Poll(
        Topic.NATURE,
        "Best weather for a long walk?",
        {"Crisp and frosty": 28, "Warm spring sun": 36, "Low cloud and wind": 13, "Light summer rain": 17},
    ),
    Poll(
        Topic.CODE,
        "Where do most of your bugs turn out to be?",
        {
            "In the code I was sure about": 52,
            "In the configuration": 37,
            "Off by one": 24,
            "In a time zone": 29,
            "In the network": 18,
        },
        detail="Be honest. Nobody reads the log.",
    ),
    Poll(
        Topic.FOOD,
        "What belongs on top of a pizza?",
        {"Just basil": 41, "Mushrooms": 28, "Pepperoni": 37, "Pineapple": 23, "An egg": 8},
    ),
    Poll(
        Topic.SCIENCE,
        "Which discovery would you most like to be there for?",
        {
            "Life on another world": 53,
            "What dark matter is": 26,
            "Fusion that pays its way": 35,
            "How memory works": 31,
        },
    ),
    Poll(
        Topic.PLACES,
        "A free weekend and a rail pass. Where to?",
        {"A big city": 24, "The coast": 39, "The mountains": 37, "Home, with the phone off": 19},
    ),
    Poll(
        Topic.PLAY,
        "How do you play a role-playing game?",
        {
            "Read every book on every shelf": 33,
            "Straight for the quest": 17,
            "Fishing, mostly": 29,
            "As a thief": 26,
        },
    ),
    Poll(
        Topic.CULTURE,
        "Subtitles or dubbing?",
        {"Subtitles": 68, "Dubbing": 13, "Subtitles in my own language, too": 36},
    ),
    Poll(
        Topic.WORK,
        "Where do you think best?",
        {"At my desk": 19, "In the shower": 38, "On a walk": 44, "In bed, too late at night": 30},
    ),
    Poll(
        Topic.NATURE,
        "Which bird would you like to hear in the morning?",
        {"Blackbird": 37, "Robin": 28, "Nightingale": 22, "Skylark": 16, "None before eight": 31},
    ),
    Poll(
        Topic.CODE,
        "How long did your last “quick fix” take?",
        {"Ten minutes": 9, "An afternoon": 37, "A week": 25, "It is still running": 30},
        open_days=5,
    ),
    Poll(
        Topic.FOOD,
        "Crunchy or smooth?",
        {"Crunchy": 54, "Smooth": 41, "Straight from the jar": 22},
        detail="Peanut butter. There is no other kind of question.",
    ),
    Poll(
        Topic.SCIENCE,
        "Which unit deserves more love?",
        {"The fortnight": 42, "The light-year": 27, "The furlong": 19, "The barn": 12, "The mole": 23},
    ),
    Poll(
        Topic.PLACES,
        "What makes a city good to live in?",
        {
            "Trains that come": 47,
            "Trees in the streets": 36,
            "Rents one can pay": 51,
            "Bakeries": 25,
            "Neighbours who say hello": 20,
        },
    ),
    Poll(
        Topic.PLAY,
        "You roll a natural one. What now?",
        {"Accept fate": 24, "Argue with the rules": 18, "Blame the die": 45, "It makes a better story": 39},
    ),
    Poll(
        Topic.CULTURE,
        "How do you keep your books?",
        {"By author": 27, "By colour": 9, "By size": 7, "In piles": 43, "In a system only I can explain": 34},
    ),
    Poll(
        Topic.NATURE,
        "What would you grow if you had one pot on a balcony?",
        {
            "Tomatoes": 38,
            "Basil": 31,
            "Strawberries": 26,
            "Something for the bees": 29,
            "A cactus, to be safe": 15,
        },
    ),
    Poll(
        Topic.WORK,
        "Which day of the week should go?",
        {"Monday": 48, "Tuesday": 17, "Wednesday": 8, "Sunday evening": 44},
        open_days=6,
    ),
    Poll(
        Topic.CODE,
        "Which editor opens first in the morning?",
        {"VS Code": 49, "Something from JetBrains": 33, "Vim or Neovim": 35, "Emacs": 14, "Notepad": 5},
    ),
    Poll(
        Topic.FOOD,
        "What is the best part of a roast dinner?",
        {"The potatoes": 57, "The gravy": 29, "What is left the day after": 34, "Pudding": 18},
    ),
    Poll(
        Topic.PLACES,
        "Which map do you trust on a walk?",
        {"Paper": 33, "The phone": 41, "A stranger": 8, "My sense of direction": 17},
    ),
    Poll(
        Topic.SCIENCE,
        "Is a hot dog a sandwich, taxonomically?",
        {"Yes": 26, "No": 47, "It is a taco": 33},
        detail="Show your reasoning to the person next to you.",
        open_days=7,
    ),
    Poll(
        Topic.NATURE,
        "Sea or mountains?",
        {"Sea": 46, "Mountains": 43, "Mountains with a view of the sea": 35},
    ),
    Poll(
        Topic.CULTURE,
        "Which film survives any number of viewings?",
        {
            "Back to the Future": 31,
            "Spirited Away": 27,
            "The Princess Bride": 34,
            "Casablanca": 15,
            "Paddington 2": 29,
        },
    ),
    Poll(
        Topic.PLAY,
        "Who teaches the rules in your group?",
        {"Me, always me": 37, "Whoever owns the game": 41, "A video": 22, "We play first and read later": 26},
    ),
    Poll(
        Topic.WORK,
        "How many browser tabs are open right now?",
        {"Fewer than ten": 21, "Ten to thirty": 34, "More than thirty": 27, "I cannot see the icons any more": 29},
    ),
)

# For a catalogue of any length, as measurements want: pairs of these, to choose between.
_RIVALS = {
    Topic.FOOD: (
        "olives, ramen, dumplings, tacos, porridge, sourdough, blue cheese, mangoes, dark chocolate, "
        "pickles, pancakes, falafel, rhubarb, garlic bread, gnocchi, ginger beer"
    ),
    Topic.CODE: (
        "type hints, unit tests, a debugger, print statements, regular expressions, makefiles, code "
        "review, pair programming, a REPL, containers, linters, stack traces, feature flags, "
        "migrations, hot reload, mono fonts"
    ),
    Topic.WORK: (
        "a standing desk, a quiet room, a second monitor, long lunches, early starts, late starts, a "
        "whiteboard, office plants, good coffee, free Fridays, noise-cancelling headphones, a short "
        "commute, working from a train, a corner office, paper notebooks, walking meetings"
    ),
    Topic.PLACES: (
        "Lisbon, Kyoto, Edinburgh, Montreal, Istanbul, Cape Town, Hanoi, Ljubljana, Oaxaca, Bergen, "
        "Marrakesh, Porto, Tbilisi, Melbourne, Valparaíso, Utrecht"
    ),
    Topic.NATURE: (
        "otters, red foxes, puffins, hedgehogs, barn owls, bumblebees, octopuses, snow leopards, sea "
        "turtles, badgers, hummingbirds, whales, beavers, wombats, ravens, dragonflies"
    ),
    Topic.CULTURE: (
        "detective stories, space operas, costume dramas, nature documentaries, westerns, musicals, "
        "heist films, ghost stories, memoirs, graphic novels, sitcoms, silent films, travel writing, "
        "short stories, quiz shows, road movies"
    ),
    Topic.SCIENCE: (
        "astronomy, botany, geology, oceanography, linguistics, chemistry, palaeontology, "
        "meteorology, mathematics, archaeology, robotics, genetics, acoustics, optics, ecology, "
        "volcanology"
    ),
    Topic.PLAY: (
        "chess, poker, table tennis, crosswords, darts, pinball, charades, dominoes, croquet, "
        "jigsaws, backgammon, Tetris, mini golf, hide and seek, bowling, draughts"
    ),
}
_PHRASES = (
    "{} or {}: which one stays?",
    "Only one can come along: {} or {}?",
    "Which would you miss more, {} or {}?",
    "For a whole year, {} or {}?",
)


def _pairs() -> Iterator[Poll]:
    rivals = {topic: [name.strip() for name in names.split(",")] for topic, names in _RIVALS.items()}
    pairs = {topic: list(combinations(names, 2)) for topic, names in rivals.items()}
    for phrase in _PHRASES:
        for number in range(min(map(len, pairs.values()))):
            for topic, candidates in pairs.items():
                # A stride that shares no factor with the number of pairs visits each once, out of order.
                one, other = candidates[number * 37 % len(candidates)]
                text = phrase.format(one, other)
                answers = {_capital(one): 1, _capital(other): 1, "I cannot choose": 0}
                yield Poll(topic, _capital(text), answers)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def catalogue() -> list[Poll]:
    """All polls there are: the written ones, then pairs to choose between."""
    return [*POLLS, *_pairs()]
