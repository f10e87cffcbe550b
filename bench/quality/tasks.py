"""Questions with known answers for a language model, from packages that anyone can install.

| task | from | the model has to |
|---|---|---|
| next_sentence | held-out Brown | prefer the true next sentence to three of other documents |
| last_word | held-out Brown | prefer a sentence's last word to three that end others there |
| agreement | held-out Brown | prefer a sentence to one where is/are, this/these … are swapped |
| capitals | `world-countries` (npm) | prefer a country's capital to three of its region |
| neighbours | `world-countries` (npm) | prefer a country's neighbour to three of its region |
| kinds | `wordnet-base` (Debian) | prefer the kind of a thing to those of three other things |
| copying | random words | continue a random sequence when it comes a second time |

A model is scored by its log-likelihoods alone, on token ids without a beginning-of-text token, as
texts are packed. `bench.quality.evaluation` uses a task only where the dense model beats chance by
five standard errors.
"""

import functools
import json
import math
import random
import re
import statistics
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.tools import assets
from grail.errors import InputError
from grail.runtime.transaction import eval_no_grad

CONTEXT = 32  # tokens before a sentence or a last word
OPTIONS = 4
COPIED = 24  # tokens of a random sequence
BEYOND = 5.0  # standard errors above chance from which a task counts
_BATCH = 8  # questions

_COUNTRIES = "world-countries@5.1.0"
_COUNTRY_ARCHIVE = "world-countries-5.1.0.tgz"
_WORDNET = "wordnet-base"
_SWAPS = ("is are", "was were", "has have", "does do", "this these", "that those")
_OTHER_FORM = {a: b for pair in _SWAPS for a, b in (pair.split(), pair.split()[::-1])}

# Of the options, the first one is right. "sum", "mean": it has the largest log-likelihood, in all
# or a token; "tokens": the share of its tokens that are the likeliest ones.
Rule = Literal["sum", "mean", "tokens"]


@dataclass(frozen=True)
class Question:
    """Token ids of what the model reads, and of the answers; the first one is right."""

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        questions: each with as many options.
        rule: see `Rule`.
        chance: mean score of a model that knows nothing.
    """

    questions: Sequence[Question]
    rule: Rule
    chance: float

    def scores(self, model: Any) -> list[float]:
        """Scores of the questions in their order, 1 is right, 0 wrong; "tokens" lies between."""
        found = [0.0] * len(self.questions)
        for index, logs, likeliest in answers(model, self.questions):
            if self.rule == "tokens":
                found[index] = float(likeliest[0].double().mean())
            else:
                sums = [float(of.sum() / (len(of) if self.rule == "mean" else 1)) for of in logs]
                found[index] = float(sums[0] > max(sums[1:]))
        return found


def answers(
    model: Any, questions: Sequence[Question]
) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """Yields a model's log-probabilities of all options of each question.

    The context runs once; its keys and values are repeated for the options.

    Args:
        model: a transformers causal language model with a cache of keys and values.
        questions: with one number of options.

    Yields:
        The question's index; per option, log-probabilities of its tokens (fp64), and whether each
        is the likeliest token (bool).
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_length[len(question.context)].append(index)
    with eval_no_grad(model), torch.inference_mode():
        for _, same in sorted(by_length.items()):
            for start in range(0, len(same), _BATCH):
                chosen = same[start : start + _BATCH]
                found = _of_batch(model, [questions[index] for index in chosen])
                yield from ((i, *of) for i, of in zip(chosen, found, strict=True))


def _of_batch(model: Any, batch: Sequence[Question]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    count = len(batch[0].options)
    device = model.device
    context = torch.tensor([question.context for question in batch], dtype=torch.int64)
    options = [option for question in batch for option in question.options]
    longest = max(map(len, options))
    # What follows an option changes nothing before it.
    padded = torch.tensor(
        [[*option, *[0] * (longest - len(option))] for option in options], dtype=torch.int64
    )
    read = model(input_ids=context.to(device), use_cache=True)
    logits = read.logits[:, -1:].repeat_interleave(count, 0)
    if longest > 1:
        cache = read.past_key_values
        cache.batch_repeat_interleave(count)
        more = model(input_ids=padded[:, :-1].to(device), past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, more.logits], 1)
    targets = padded.to(device)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    logs = chosen.double() - logits.float().logsumexp(-1).double()
    hits = logits.argmax(-1) == targets
    for index in range(len(batch)):
        rows = range(index * count, (index + 1) * count)
        yield (
            [logs[row, : len(options[row])].cpu() for row in rows],
            [hits[row, : len(options[row])].cpu() for row in rows],
        )


def beats_chance(scores: Sequence[float], chance: float) -> bool:
    """Returns True if the mean of `scores` exceeds chance by five standard errors.

    The standard error is the larger of the scores' own and of that of a guess, √(c (1 − c) / n).
    """
    count = len(scores)
    guess = math.sqrt(chance * (1 - chance) / count)
    own = statistics.stdev(scores) / math.sqrt(count) if count > 1 else 0.0
    return statistics.fmean(scores) - chance > BEYOND * max(own, guess)


Encode = Callable[[str], tuple[int, ...]]


def build(name: str, tokenizer: Any, cache: str | Path, count: int) -> Task:
    """The first `count` questions of a task, the same every time.

    Args:
        name: of `TASKS`.
        tokenizer: of the model.
        cache: folder that keeps what is downloaded.
        count: of questions; fewer where the package has fewer, and of long ones.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    maker, rule, chance, part = TASKS[name]
    questions: list[Question] = []
    for question in maker(encode, Path(cache), random.Random(name)):
        if len(questions) >= count * part:
            break
        if question not in questions:
            questions.append(question)
    return Task(questions, rule, chance)


def sentences_of(document: str) -> list[str]:
    """Sentences of a document in order, without those of fewer than 3 words."""
    ends = r'(?<=[a-z]{3}[.?!])\s+(?=["A-Z])|(?<=[a-z]{3}[.?!]")\s+(?=["A-Z])|\n\s*\n'
    return [piece for piece in re.split(ends, document) if len(piece.split()) > 2]


@functools.cache
def _documents(cache: Path) -> list[list[str]]:
    """Sentences of the held-out documents of the Brown corpus."""
    _, heldout = assets.split_genres(assets.brown(cache))
    return [sentences_of(document) for document in heldout]


def _places(
    documents: Sequence[Sequence[str]], generator: random.Random
) -> Iterator[tuple[Sequence[str], int]]:
    """Yields a random sentence of each document in turn, without end, none of its first ones."""
    long = [document for document in documents if len(document) > 12]
    while long:
        for document in long:
            yield document, generator.randrange(6, len(document) - 1)


def _before(
    encode: Encode, sentences: Sequence[str], index: int, more: str = ""
) -> tuple[int, ...]:
    """The last `CONTEXT` tokens before a sentence, and before the rest of it after `more`."""
    text = " ".join([*sentences[max(0, index - 6) : index], *([more] if more else [])])
    return encode(text)[-CONTEXT:]


def _next_sentences(encode: Encode, cache: Path, generator: random.Random) -> Iterator[Question]:
    documents = _documents(cache)
    fitting = {id(of): [s for s in of if 6 <= len(s.split()) <= 12] for of in documents}
    for sentences, index in _places(documents, generator):
        context = _before(encode, sentences, index)
        if sentences[index] in fitting[id(sentences)] and len(context) == CONTEXT:
            others = [of for of in documents if of is not sentences and fitting[id(of)]]
            chosen = generator.sample(others, OPTIONS - 1)
            options = [sentences[index], *(generator.choice(fitting[id(of)]) for of in chosen)]
            yield Question(context, tuple(encode(f" {option}") for option in options))


def _last_words(encode: Encode, cache: Path, generator: random.Random) -> Iterator[Question]:
    pattern = re.compile(r"(.* .*) ([a-z]{4,})[.?!]")
    for sentences, index in _places(_documents(cache), generator):
        found = pattern.fullmatch(sentences[index])
        context = _before(encode, sentences, index, found[1]) if found else ()
        if not found or len(context) < CONTEXT:
            continue
        ends = (pattern.fullmatch(sentence) for sentence in sentences)
        others = sorted({end[2] for end in ends if end} - {found[2]})
        if len(others) >= OPTIONS - 1:
            options = [found[2], *generator.sample(others, OPTIONS - 1)]
            yield Question(context, tuple(encode(f" {option}") for option in options))


def _agreement(encode: Encode, cache: Path, generator: random.Random) -> Iterator[Question]:
    pattern = re.compile(rf"(\S+ .*\S) ({'|'.join(_OTHER_FORM)})( .*)")
    for sentences, index in _places(_documents(cache), generator):
        found = pattern.fullmatch(sentences[index])
        if found and len(sentences[index].split()) <= 20:
            forms = (found[2], _OTHER_FORM[found[2]])
            yield Question(encode(found[1]), tuple(encode(f" {form}{found[3]}") for form in forms))


@functools.cache
def _countries(cache: Path) -> list[dict[str, Any]]:
    archive = cache / _COUNTRY_ARCHIVE
    assets.npm_archive(_COUNTRIES, archive)
    try:
        with tarfile.open(archive) as files:
            found: list[dict[str, Any]] = json.load(files.extractfile("package/countries.json"))
    except (tarfile.TarError, KeyError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{archive} is damaged ({error}); delete it and run again") from error
    return [country for country in found if country["unMember"]]


def _about_countries(
    text: str,
    right: Callable[[dict[str, Any]], Sequence[str]],
    wrong: Callable[[dict[str, Any], dict[str, Any]], str | None],
) -> Callable[[Encode, Path, random.Random], Iterator[Question]]:
    """Questions about countries in random order.

    Args:
        text: of the question, with {} for the country.
        right: answers of a country, of which the first is taken.
        wrong: of a country and another one of its region, a wrong answer that the other one gives.
    """

    def questions(encode: Encode, cache: Path, generator: random.Random) -> Iterator[Question]:
        countries = _countries(cache)
        for country in generator.sample(countries, len(countries)):
            others = {
                answer
                for other in countries
                if other["region"] == country["region"] and other is not country
                if (answer := wrong(country, other)) is not None
            }
            if right(country) and len(others) >= OPTIONS - 1:
                options = [right(country)[0], *generator.sample(sorted(others), OPTIONS - 1)]
                yield Question(
                    encode(text.format(_spoken(country))), tuple(encode(f" {o}") for o in options)
                )

    return questions


def _spoken(country: dict[str, Any]) -> str:
    name: str = country["name"]["common"]
    united = name.startswith("United") or name.endswith(("Islands", "Republic"))
    return f"the {name}" if united or name in _WITH_ARTICLE else name


_WITH_ARTICLE = {"Bahamas", "Gambia", "Maldives", "Netherlands", "Philippines", "Seychelles"}


_capitals = _about_countries(
    "The capital of {} is",
    lambda country: country["capital"],
    lambda country, other: next((c for c in other["capital"] if c not in country["capital"]), None),
)


def _neighbours(encode: Encode, cache: Path, generator: random.Random) -> Iterator[Question]:
    named = {country["cca3"]: _spoken(country) for country in _countries(cache)}
    yield from _about_countries(
        "{} shares a border with",
        lambda country: [named[code] for code in country["borders"] if code in named],
        lambda country, other: None if other["cca3"] in country["borders"] else _spoken(other),
    )(encode, cache, generator)


def _kinds(encode: Encode, cache: Path, generator: random.Random) -> Iterator[Question]:
    """Things and their kinds."""
    pairs = hypernyms(assets.debian_files(_WORDNET, cache, ["index.noun", "data.noun"]))
    names = sorted(pairs)
    kinds = sorted(set(pairs.values()))
    for name in generator.sample(names, len(names)):
        right = pairs[name]
        others = generator.sample([kind for kind in kinds if kind != right], OPTIONS - 1)
        yield Question(
            encode(f"{_article(name).capitalize()} {name} is a kind of"),
            tuple(encode(f" {option}") for option in (right, *others)),
        )


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


# Files of the lexicographers: animals, artifacts, bodies, food, objects, plants, substances.
_THINGS = {"05", "06", "08", "13", "17", "20", "27"}
_PLAIN = re.compile(r"[a-z]{3,}")


def hypernyms(folder: Path) -> dict[str, str]:
    """Names of things that texts mention and their kinds, each one word in its first sense.

    Args:
        folder: with `index.noun` and `data.noun` of WordNet 3.0 (Miller 1995), whose format
            wndb(5WN) describes.
    """
    first: dict[str, str] = {}  # sense of a name
    for line in (folder / "index.noun").read_text(encoding="latin-1").splitlines():
        name, *numbers = line.split()
        if _PLAIN.fullmatch(name):
            senses = int(numbers[1])
            if int(numbers[-senses - 1]):  # of them are tagged in texts
                first[name] = numbers[-senses]
    names: dict[str, str] = {}  # of a sense
    parents: dict[str, str] = {}
    for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):
            continue  # the licence
        offset, file, _, _, name, *rest = line.partition("|")[0].split()
        names[offset] = name
        parent = re.search(r" @ (\d{8}) n 0000", " ".join(["", *rest]))
        if parent and file in _THINGS:
            parents[offset] = parent[1]
    pairs = {name: names[parents[sense]] for name, sense in first.items() if sense in parents}
    return {name: kind for name, kind in pairs.items() if _PLAIN.fullmatch(kind) and kind != name}


def _copying(encode: Encode, cache: Path, generator: random.Random) -> Iterator[Question]:
    """The first tokens of random words, and again the start of these; the rest is asked for."""
    used = {word for document in _documents(cache) for s in document for word in s.split()}
    words = sorted(word for word in used if re.fullmatch("[a-z]{4,8}", word))
    while True:
        sequence = tuple(encode(f" {word}")[0] for word in generator.sample(words, COPIED))
        if len(set(sequence)) == COPIED:
            start = COPIED // 3
            yield Question((*sequence, *sequence[:start]), (sequence[start:],))


# Questions, rule, chance, and share of the wanted number of questions, less of long ones.
TASKS: dict[
    str,
    tuple[Callable[[Encode, Path, random.Random], Iterator[Question]], Rule, float, float],
] = {
    "next_sentence": (_next_sentences, "mean", 1 / OPTIONS, 1 / 2),
    "last_word": (_last_words, "sum", 1 / OPTIONS, 1),
    "agreement": (_agreement, "sum", 1 / 2, 1),
    "capitals": (_capitals, "sum", 1 / OPTIONS, 1),
    "neighbours": (_neighbours, "sum", 1 / OPTIONS, 1),
    "kinds": (_kinds, "sum", 1 / OPTIONS, 1),
    "copying": (_copying, "tokens", 1 / COPIED, 1 / 4),
}
