"""The heads of encoders, which several architectures have alike.

A head that Hugging Face peft trains beside an adapter has the role `"head"`. peft goes by the name: `classifier` or
`score` for classes of texts and tokens, `qa_outputs` for answers. A head with another name is a layer like any other.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftlab.memory.counting.config import Config
from peftlab.memory.counting.modules import Module, linear

HIDDEN_WORDS = ("masked", "language model")  # the tasks with a head that gives words


def classifier(width: int, labels: int) -> Module:
    """Return the row of a linear layer that gives classes."""
    return linear("classifier", width, labels, True, role="head")


def one_layer(task: str, width: int, labels: int) -> Iterator[Module]:
    """Yield the head of one linear layer that a task has in most encoders, or nothing."""
    if task == "question answering":
        yield linear("qa_outputs", width, labels, True, role="head")
    elif task == "multiple choice":
        yield classifier(width, 1)
    elif task in ("classifier", "token classifier"):
        yield classifier(width, labels)


def two_layers(path: str, width: int, labels: int, role: str = "head") -> Iterator[Module]:
    """Yield a classification head of two linear layers."""
    yield linear(f"{path}.dense", width, width, True, role=role)
    yield linear(f"{path}.out_proj", width, labels, True, role=role)


def guessed_words(
    c: Config, path: str, width: int, bias: bool = True, shared_bias: str | None = None
) -> Iterator[Module]:
    """Yield the layer that gives words, whose matrix is the word embedding unless the configuration unties it.

    In some models, the bias belongs to another module too, `shared_bias`. Without the tie it is a second parameter.
    """
    tied, vocabulary = c.flag("tie_word_embeddings", True), c.size("vocab_size")
    yield linear(path, width, vocabulary, bias, tied=tied, role="output")
    if shared_bias and not tied:
        yield Module(shared_bias, "bias", 1, vocabulary, True)
