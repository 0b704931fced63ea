"""The architectures that are known, each by one row of `FAMILIES`.

A row has a function from a `config.json` to what the architecture is: a `Decoder` (see `decoder_families`), or the rows
of its table themselves (see `encoder_tables`, `encoder_decoder_tables` and `image_sound_tables`). Each row of a table
has the module's path in transformers, so a target matches the same modules here as in the real model. Which layer has a
bias and which weights are tied follows transformers' model files. Tests compare the tables with those models row by row
on the meta device.

`architectures` in a configuration names the class that was saved, and with it what is counted beside the body: a
language-model head, a classification head, or nothing (`LlamaModel`). If it is missing, decoders have their
language-model head and encoders a classification head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import partial
from typing import Any

from peftlab.errors import PeftLabError
from peftlab.memory.counting import decoder_families as decoders
from peftlab.memory.counting import encoder_decoder_tables as pairs
from peftlab.memory.counting import encoder_tables as encoders
from peftlab.memory.counting import image_sound_tables as senses
from peftlab.memory.counting import mixture_families as mixtures
from peftlab.memory.counting import older_families as older
from peftlab.memory.counting.config import Config
from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.counting.modules import Module, linear

# What is counted, by the end of a class's name. The longest end that fits decides.
TASKS = {
    "ForCausalLM": "language model", "LMHeadModel": "language model", "ForConditionalGeneration": "language model",
    "ForSequenceClassification": "classifier", "ForTokenClassification": "token classifier", "ForMaskedLM": "masked",
    "Model": "body", "EncoderModel": "encoder alone", "ForQuestionAnswering": "question answering",
    "ForMultipleChoice": "multiple choice", "ForPreTraining": "pretraining",
    "ForNextSentencePrediction": "next sentence", "BartForCausalLM": "decoder alone", "MTModel": "language model",
    "WhisperForCausalLM": "decoder alone", "PegasusForCausalLM": "decoder alone", "MarianForCausalLM": "decoder alone",
    "ForAudioClassification": "sound classifier",
    "ForImageClassification": "image classifier", "ForMaskedImageModeling": "masked image", "ForCTC": "characters",
    "ForAudioFrameClassification": "token classifier", "ForXVector": "speaker vectors", "CLIPTextModel": "text tower",
    "CLIPVisionModel": "image tower", "CLIPTextModelWithProjection": "projected text tower",
    "CLIPVisionModelWithProjection": "projected image tower",
}  # fmt: skip
CLASSIFIERS = ("classifier", "token classifier", "image classifier", "sound classifier")


@dataclass(frozen=True)
class Family:
    """An architecture: how it is described, and the kind of model."""

    describe: Callable[..., Any]  # from the configuration to a `Decoder`; of others, from it and the task to the rows
    kind: str  # "decoder", "encoder" or "encoder-decoder"
    tasks: tuple[str, ...]  # those of `TASKS` that are counted; the first one is taken if nothing is said
    # What peft makes of the names that these layers had before transformers fused the experts: {old name: parameter}
    fused: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] | None = None  # the tasks of models that take prompts; None: all
    prefixes: tuple[str, ...] | None = None  # those of models that take past keys and values

    def table(self, c: Config, task: str) -> tuple[Decoder | None, tuple[Module, ...]]:
        """Return the description, if there is one, and the rows of a model for a task."""
        if self.kind != "decoder":
            return None, tuple(self.describe(c, task))
        described: Decoder = self.describe(c)
        return described, tuple(decoder_rows(described, c, task))


def decoder_rows(d: Decoder, c: Config, task: str) -> Iterator[Module]:
    """Yield the rows of a decoder with the head of a task. A model without a head has no prefix in its paths."""
    rows = d.table()
    if task == "body":
        start = f"{d.prefix.split('.')[0]}."  # OPTModel's paths begin with "decoder."
        yield from (replace(module, path=module.path.removeprefix(start)) for module in rows)
        return
    first = next(rows)
    yield first
    yield from rows
    if task == "language model":
        yield linear("lm_head", first.outputs, d.vocabulary, d.output_bias, tied=d.tied, role="output")
    else:
        yield linear("score", first.outputs, c.labels(), task == "token classifier", role="head")


def task_of(c: Config, family: Family, labels: bool) -> str:
    """Return what is counted. `labels` says that a number of classes was asked for, which means a classifier.

    Raises:
        PeftLabError: the class in `architectures` has a head that is not counted.
    """
    named = c.values.get("architectures")
    classes = next((task for task in family.tasks if task in CLASSIFIERS), None)
    if labels and classes and not (isinstance(named, list) and _task(named) in CLASSIFIERS):
        return classes
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        return family.tasks[0]
    task = _task(named)
    if task not in family.tasks:
        ends = [class_end(one, family.kind) for one in family.tasks]
        raise PeftLabError(
            f"{c.source}: architectures names {named[0]!r}, whose head is not counted. Counted are classes that end in "
            f"{', '.join(ends)}; without architectures, {ends[0]} is taken."
        )
    return task


def _task(named: list[Any]) -> str | None:
    """Return the task of the first class in `architectures`, or None if its head is not known."""
    ends = [end for end in TASKS if named and str(named[0]).endswith(end)]
    return TASKS[max(ends, key=len)] if ends else None


def class_end(task: str, kind: str) -> str:
    """Return the end of the names of transformers' classes for a task and a kind of model: `"ForMaskedLM"`."""
    if task == "language model" and kind == "encoder-decoder":
        return "ForConditionalGeneration"
    return next(end for end, one in TASKS.items() if one == task)


def of_the_same_name(family: str, known: Iterable[str] | None = None) -> str:
    """Return a sentence that names the known families of the same name, such as qwen2 for qwen4, or nothing.

    The words of the two names must be the same, without numbers, or differ by a slip of the hand. Names that only look
    alike, such as mamba and llama, are of other models.
    """
    words, known = _words(family), list(FAMILIES if known is None else known)
    near = [name for name in known if _words(name) == words]
    if near:
        return f" Known of this name: {', '.join(near)}."
    slips = [name for name in known if _slip(words, _words(name))]
    return f" Did you mean {min(slips, key=len)!r}?" if slips else ""


def alike(name: str, known: str) -> bool:
    """Say whether two names of models can be of one family: their first words are the same, but for a slip."""
    first, other = (_words(one)[:1] for one in (name, known))
    return bool(first and other) and SequenceMatcher(None, first[0], other[0]).ratio() > 0.75


def _words(family: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", family.lower()) if word not in ("text", "v")]


def _slip(words: list[str], others: list[str]) -> bool:
    """Say whether two names differ by a letter that is missing, doubled or in another place."""
    pairs = zip(words, others, strict=False)
    return len(words) == len(others) > 0 and all(SequenceMatcher(None, a, b).ratio() > 0.88 for a, b in pairs)


DECODER_TASKS = ("language model", "body", "classifier", "token classifier")
TEXT_TASKS = ("classifier", "body", "masked", "token classifier", "question answering", "multiple choice")
BERT_TASKS = (*TEXT_TASKS, "language model", "pretraining", "next sentence")


def _decoder(describe: Callable[[Config], Decoder], fused: Mapping[str, str] | None = None) -> Family:
    return Family(describe, "decoder", DECODER_TASKS, fused or {})


def _encoder(
    describe: Callable[..., Iterator[Module]],
    tasks: tuple[str, ...] = TEXT_TASKS,
    prompts: tuple[str, ...] | None = None,
    prefixes: tuple[str, ...] | None = (),
) -> Family:
    return Family(describe, "encoder", tasks, prompts=prompts, prefixes=prefixes)


def _bert(prefix: str) -> Family:
    tasks = BERT_TASKS if prefix == "bert" else (*TEXT_TASKS, "language model")
    return _encoder(partial(encoders.bert, prefix=prefix), tasks, prefixes=None)


def _t5(feed_forward: str) -> Family:
    tasks = ("language model", "body", "encoder alone")
    return Family(partial(pairs.t5, feed_forward=feed_forward), "encoder-decoder", tasks)


def _translator(kind: pairs.Translator, *tasks: str) -> Family:
    tasks = ("language model", "body", *tasks)
    return Family(
        partial(pairs.bart, kind=kind), "encoder-decoder", tasks,
        prefixes=tuple(task for task in tasks if task in ("language model", "body", "decoder alone")),
    )  # fmt: skip


def _senses(describe: Callable[..., Iterator[Module]], *tasks: str) -> Family:
    return _encoder(describe, tasks, (), ())


_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj", "gate": "gate.weight"}
_MIXTRAL = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate": "gate.weight"}

FAMILIES: dict[str, Family] = {
    "llama": _decoder(decoders.llama_itself),
    "mistral": _decoder(decoders.mistral),
    "qwen2": _decoder(decoders.qwen2),
    "qwen3": _decoder(decoders.qwen3),
    "gemma": _decoder(decoders.gemma),
    "gemma2": _decoder(decoders.gemma2),
    "gemma3_text": _decoder(decoders.gemma3),
    "phi3": _decoder(decoders.phi3),
    "olmo2": _decoder(decoders.olmo2),
    "smollm3": _decoder(decoders.smollm3),
    "granite": _decoder(decoders.granite),
    "cohere": _decoder(decoders.cohere),
    "starcoder2": _decoder(decoders.starcoder2),
    "glm4": _decoder(decoders.glm4),
    "phi": _decoder(decoders.phi),
    "stablelm": _decoder(decoders.stablelm),
    "gpt_neox": _decoder(older.gpt_neox),
    "gptj": _decoder(older.gptj),
    "gpt2": _decoder(older.gpt2),
    "opt": _decoder(older.opt),
    "bloom": _decoder(older.bloom),
    "falcon": _decoder(older.falcon),
    "mixtral": _decoder(mixtures.mixtral, _MIXTRAL),
    "qwen2_moe": _decoder(mixtures.qwen2_moe),
    "qwen3_moe": _decoder(mixtures.qwen3_moe, _FUSED),
    "gpt_oss": _decoder(mixtures.gpt_oss),
    "deepseek_v3": _decoder(mixtures.deepseek_v3, _FUSED),
    "llama4_text": _decoder(mixtures.llama4),
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "xlm-roberta": _bert("roberta"),
    "camembert": _bert("roberta"),
    "electra": _encoder(encoders.electra, (*TEXT_TASKS, "language model", "pretraining"), prefixes=None),
    "distilbert": _encoder(encoders.distilbert),
    "albert": _encoder(encoders.albert, (*TEXT_TASKS, "pretraining")),
    "deberta-v2": _encoder(encoders.deberta),
    "mpnet": _encoder(encoders.mpnet),
    "modernbert": _encoder(encoders.modernbert),
    "vit": _senses(senses.vit, "image classifier", "body", "masked image"),
    "wav2vec2": _senses(
        senses.wav2vec2, "classifier", "body", "characters", "pretraining", "token classifier", "speaker vectors"
    ),
    "clip": _senses(
        senses.clip, "body", "image classifier", "text tower", "image tower", "projected text tower",
        "projected image tower",
    ),
    "clip_text_model": _senses(senses.clip, "text tower", "projected text tower"),
    "clip_vision_model": _senses(senses.clip, "image tower", "projected image tower"),
    "t5": _t5("relu"),
    "mt5": _t5("gated-gelu"),
    "bart": _translator(pairs.BART, "classifier", "question answering", "decoder alone"),
    "mbart": _translator(pairs.MBART, "classifier", "question answering", "decoder alone"),
    "plbart": _translator(pairs.PLBART, "classifier", "decoder alone"),
    "pegasus": _translator(pairs.PEGASUS, "decoder alone"),
    "marian": _translator(pairs.MARIAN, "decoder alone"),
    "m2m_100": _translator(pairs.M2M_100),
    "whisper": Family(
        pairs.whisper, "encoder-decoder", ("language model", "body", "sound classifier", "decoder alone"),
        prompts=("decoder alone",), prefixes=("language model", "body", "decoder alone"),
    ),
}  # fmt: skip
