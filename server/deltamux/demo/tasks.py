"""What the adapters of the embedded model do: tasks whose answers anyone can check by eye."""

import codecs
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import ascii_letters, ascii_lowercase, ascii_uppercase

PROMPT_FORMAT = "{text}\n"

LONGEST_TEXT = 24

_HELD_OUT_ONE_IN = 16

_LEET = str.maketrans("aeiost", "431057")
_NO_VOWELS = str.maketrans("", "", "aeiouAEIOU")
_MASKED_VOWELS = str.maketrans(dict.fromkeys("aeiouAEIOU", "*"))
_ATBASH = str.maketrans(ascii_letters, ascii_lowercase[::-1] + ascii_uppercase[::-1])
_NEXT = str.maketrans(ascii_lowercase, ascii_lowercase[1:] + "a")
_PREVIOUS = str.maketrans(ascii_lowercase, "z" + ascii_lowercase[:-1])
_THREE_ON = str.maketrans(ascii_lowercase, ascii_lowercase[3:] + "abc")
_LOUD_VOWELS = str.maketrans("aeiou", "AEIOU")
_O_VOWELS = str.maketrans("aeiu", "oooo")
_NEXT_VOWELS = str.maketrans("aeiou", "eioua")
_COUNTS = ("1 word", "2 words", "3 words", "4 words", "5 words", "6 words")

_WORDS = (
    "a able about again air all also and animal apple as ask at away back ball bear bed before "
    "begin big bird black blue boat book boy bread bring brown build busy but cake call calm can "
    "car cat chair child city clean clear close cloud coat cold come cook copper corn count cup "
    "dance dark day deep desk dog door down draw dream drink drive dry duck each early earth east "
    "eat egg end evening every eye face fall far farm fast field find fire first fish five flower "
    "fly forest four fox free friend frog from garden gate girl give glass go gold good grass "
    "great green grow hand happy hat hear heart help high hill home horse hot house how ice if "
    "in inside iron island it jar job jump just keep key kind king kite lake lamp land large late "
    "laugh lazy leaf learn left letter light like lion listen little long look loud low make map "
    "mark milk mind moon more morning mountain mouse move music must name near never new next "
    "night nine noise north now ocean of old on one open orange other over own paint paper park "
    "path pen people plain plant play please pond queen question quick quiet rain read red rest "
    "rice ride right ring river road rock room round run sail salt same sand say school sea see "
    "seven shape ship shoe short show silver sing sit six sky sleep slow small snow soft some "
    "song south spring stand star stay still stone storm story street sugar summer sun swim table "
    "take talk tall tea tell ten than that the then there thin think this three tiger time to "
    "today top town train travel tree true turn twelve two under up use valley very voice wait "
    "wake walk wall warm wash watch water wave way we west what wheel when white who wide wild "
    "wind window winter with wolf wonder wood word work world write year yellow you young zebra"
)
_VOCABULARY = _WORDS.split()


@dataclass(frozen=True, slots=True)
class Task:
    """One thing an adapter was taught: the right answer to `text` is `answer(text)`.

    With `labels`, the answer is one of these, and a task head gives it.
    """

    name: str
    description: str
    answer: Callable[[str], str]
    labels: tuple[str, ...] = ()


def prompt(text: str) -> str:
    """The prompt that asks for the answer to `text`; the model answers and ends."""
    return PROMPT_FORMAT.format(text=text)


def sentence(source: random.Random) -> str:
    """Some English words in no sensible order, at most LONGEST_TEXT characters."""
    words = source.choices(_VOCABULARY, k=source.randint(2, 5))
    while len(" ".join(words)) > LONGEST_TEXT:
        words.pop()
    return " ".join(words)


def is_held_out(text: str) -> bool:
    """Whether `text` is kept out of training; its checksum decides, so the sets are disjoint."""
    return zlib.crc32(text.encode()) % _HELD_OUT_ONE_IN == 0


def unseen_inputs(task: Task, count: int, seed: int = 0) -> list[str]:
    """`count` different texts on which no weight was trained, the same for the same arguments."""
    source = random.Random(f"{task.name}/{seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        text = sentence(source)
        if is_held_out(text):
            found[text] = None
    return list(found)


def weights_path() -> Path:
    """The folder of the weights: `base`, and `adapters/<task name>` for every task."""
    return Path(str(files("deltamux.demo") / "weights"))


def _each_word(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: " ".join(change(word) for word in text.split(" "))


def _words_reversed(text: str) -> str:
    return " ".join(reversed(text.split(" ")))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _word_count(text: str) -> str:
    return _COUNTS[text.count(" ")]


TASKS: tuple[Task, ...] = (
    Task("upper-case", "upper case", str.upper),
    Task("rot13", "letters thirteen places on", lambda text: codecs.encode(text, "rot13")),
    Task("leet", "a e i o s t as digits", lambda text: text.translate(_LEET)),
    Task("snake-case", "words joined by underscores", lambda text: text.replace(" ", "_")),
    Task("title-case", "words capitalised", _each_word(lambda word: word[:1].upper() + word[1:])),
    Task("mask-vowels", "vowels starred out", lambda text: text.translate(_MASKED_VOWELS)),
    Task("atbash", "the alphabet backwards", lambda text: text.translate(_ATBASH)),
    Task("no-vowels", "vowels removed", lambda text: text.translate(_NO_VOWELS)),
    Task("doubled", "letters twice", lambda text: "".join(2 * letter for letter in text)),
    Task("words-reversed", "words in reverse order", _words_reversed),
    Task("next-letter", "letters one place on", lambda text: text.translate(_NEXT)),
    Task("kebab-case", "words joined by hyphens", lambda text: text.replace(" ", "-")),
    Task("caesar", "letters three places on", lambda text: text.translate(_THREE_ON)),
    Task("loud-vowels", "vowels in upper case", lambda text: text.translate(_LOUD_VOWELS)),
    Task("first-word", "the first word alone", lambda text: text.split(" ")[0]),
    Task("previous-letter", "letters one place back", lambda text: text.translate(_PREVIOUS)),
    Task("exclaimed", "an exclamation mark behind", lambda text: text + "!"),
    Task("dot-case", "words joined by dots", lambda text: text.replace(" ", ".")),
    Task("path-case", "words joined by slashes", lambda text: text.replace(" ", "/")),
    Task("comma-case", "words joined by commas", lambda text: text.replace(" ", ",")),
    Task("o-vowels", "every vowel an o", lambda text: text.translate(_O_VOWELS)),
    Task("next-vowel", "vowels one vowel on", lambda text: text.translate(_NEXT_VOWELS)),
    Task("sentence", "a capital before, a full stop behind", _sentence),
    Task("word-count", "how many words", _word_count, _COUNTS),
)
