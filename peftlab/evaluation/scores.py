"""Scores of answers against references: accuracy, macro F1, exact match, words in common, BLEU and chrF."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peftlab.checks import checked, one_of, whole
from peftlab.errors import PeftLabError
from peftlab.evaluation.values import classes, items, same_length, texts
from peftlab.optional import require

TOKENIZERS = ("13a", "intl", "char", "none", "zh")  # those of sacrebleu that need no further package


@checked()
def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Return the share of predictions that equal their reference, between 0 and 1.

    It misleads when classes are unbalanced: if 95% of the examples have one class, always answering that class scores
    0.95. Look at `macro_f1` as well.

    >>> round(pl.accuracy([1, 0, 1], [1, 1, 1]), 3)
    0.667
    """
    found, right = classes(predictions, references)
    # accuracy = |{i : p_i = r_i}| / n
    return sum(p == r for p, r in zip(found, right, strict=True)) / len(right)


@checked()
def macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Return the mean of F1 over the classes, each of which counts alike.

    F1 is the harmonic mean of precision and recall. The classes are those that occur in the references or the
    predictions. It misleads when a class is rare: one example of it, right or wrong, then moves the mean a lot.

    >>> pl.macro_f1([1, 0, 1], [1, 1, 1])
    0.4
    """
    pairs = list(zip(*classes(predictions, references), strict=True))
    try:
        labels = {value for pair in pairs for value in pair}
    except TypeError:
        raise PeftLabError("Classes must be numbers or texts; found a list or a dict among them.") from None
    scores = []
    for label in labels:
        hits = sum(p == label and r == label for p, r in pairs)
        predicted, actual = sum(p == label for p, _ in pairs), sum(r == label for _, r in pairs)
        # F1 = 2 P R / (P + R), with P = hits/predicted and R = hits/actual, is 2 hits / (predicted + actual)
        scores.append(2 * hits / (predicted + actual))
    return sum(scores) / len(scores)


@checked()
def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of texts that equal their reference, between 0 and 1. White space at both ends is ignored.

    It misleads when one answer can be written in several ways, such as JSON with its keys in another order.

    >>> pl.exact_match(["yes ", "no"], ["yes", "maybe"])
    0.5
    """
    pairs = _pairs(predictions, references)
    return sum(p.strip() == r.strip() for p, r in pairs) / len(pairs)


@checked()
def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean over texts of the F1 of their words, between 0 and 1: ROUGE-1 without stemming (Lin 2004).

    A word is a run of letters and digits, in lower case. A word that occurs twice must be found twice. The score says
    that the right words are there. It does not say that they make a sentence, or that the sentence is true.

    >>> round(pl.token_f1(["the red cat"], ["a red cat"]), 3)
    0.667
    """
    pairs = _pairs(predictions, references)
    return sum(_words_f1(p, r) for p, r in pairs) / len(pairs)


def _pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    same_length(predictions, references)
    return list(zip(texts("predictions", predictions), texts("references", references), strict=True))


def _words_f1(prediction: str, reference: str) -> float:
    found, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, reference))
    both = (found & wanted).total()
    # F1 = 2 P R / (P + R), with P = both / found and R = both / wanted; two empty texts are equal
    size = found.total() + wanted.total()
    return 2 * both / size if size else 1.0


@checked()
def bleu(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> float:
    """Return corpus BLEU between 0 and 100 (Papineni et al. 2002), as sacrebleu computes it (Post 2018).

        BLEU = 100 BP exp( mean over n = 1..4 of log p_n )        BP = min(1, exp(1 - reference length / length))

    p_n is the share of all n-grams of words that a reference holds too, counted over the whole corpus, and smoothed
    where it is zero (sacrebleu's `exp`). It misleads on short answers, which have no 4-grams, and it hardly notices a
    missing "not".

    Args:
        predictions: n texts.
        references: n texts, or for each of the n answers a list of texts that are all right.
        lowercase: ignore case.
        tokenize: how words are found: `"13a"` (sacrebleu's default), `"intl"`, `"char"`, `"zh"` or `"none"`.

    Raises:
        PeftLabError: the lists differ in length or are empty, or sacrebleu is missing.

    >>> round(pl.bleu(["the cat sat on the mat today"], ["the cat sat on a mat today"]), 1)
    48.9
    """
    return corpus_score(bleu_metric(lowercase, tokenize), predictions, references)


@checked()
def chrf(predictions: Sequence[str], references: Sequence[str | Sequence[str]], *, word_order: int = 0) -> float:
    """Return corpus chrF between 0 and 100 (Popović 2015), as sacrebleu computes it.

        chrF = 100 (1 + 4) P R / (4 P + R)

    P and R are the precision and the recall of runs of 1 to 6 characters, without spaces, averaged over the six
    lengths. Recall counts twice as much. It works on short answers and on any language, and it notices a misspelt word
    less than BLEU does. It has no idea of meaning either.

    Args:
        predictions, references: as for `bleu`.
        word_order: 2 also counts words and pairs of words: chrF++ (Popović 2017).

    Raises:
        PeftLabError: the lists differ in length or are empty, or sacrebleu is missing.

    >>> round(pl.chrf(["the cat sat on the mat today"], ["the cat sat on a mat today"]), 1)
    77.1
    """
    return corpus_score(chrf_metric(word_order), predictions, references)


def bleu_metric(lowercase: bool = False, tokenize: str = "13a") -> Any:
    """Return sacrebleu's BLEU with these settings."""
    one_of("tokenize", tokenize, TOKENIZERS)
    # force: no warning to stderr where a text ends in a tokenised full stop
    return require("sacrebleu").metrics.BLEU(lowercase=lowercase, tokenize=tokenize, force=True)


def chrf_metric(word_order: int = 0) -> Any:
    """Return sacrebleu's chrF with these settings."""
    word_order = whole("word_order", word_order, least=0, most=6)
    return require("sacrebleu").metrics.CHRF(word_order=word_order)


def corpus_score(metric: Any, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Return what one of sacrebleu's metrics gives for a corpus."""
    same_length(predictions, references)
    columns = by_column(items("references", references))
    return float(metric.corpus_score(texts("predictions", predictions), columns).score)


def by_column(references: Sequence[str | Sequence[str]]) -> list[list[str | None]]:
    """Turn the references of each text into sacrebleu's form: a list of first references, one of second ones, ..."""
    each = [[one] if isinstance(one, str) else list(one) if isinstance(one, Sequence) else [] for one in references]
    if not all(each) or not all(isinstance(text, str) for texts in each for text in texts):
        raise PeftLabError("each entry of references must be a text, or a list of at least one text.")
    most = max(len(texts) for texts in each)
    return [[texts[k] if k < len(texts) else None for texts in each] for k in range(most)]
