"""The model card of an adapter folder: a README.md with the front matter that Hugging Face's hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.catalogue import METHODS

CARD = "README.md"
TRAINING, LOADING = "## Training", "## How to load it"
# A README.md without this line is a person's, and is never overwritten.
MARKER = "<!-- Written by peftlab. Remove this line to keep your changes: the next save leaves this file alone. -->"
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
OPENERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
NOT_SETTINGS = ("base_model_name_or_path", "inference_mode", "peft_type", "task_type")


def may_write(folder: Path) -> bool:
    """Say whether the folder's README.md is one of ours, or none is there."""
    if (folder / CARD).is_symlink():
        return False
    try:
        return MARKER in (folder / CARD).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def card(
    root: Any,
    method: str,
    fields: Mapping[str, Any],
    parameters: int,
    about: Mapping[str, Any] | None = None,
    serving: Sequence[str] = (),
    earlier: str = "",
) -> bytes:
    """Return the text of a card.

    Args:
        root: the model; `load_model` notes on it where the book's models come from, and on what terms. None if only a
            folder is known.
        method: its name in the catalogue.
        fields: the contents of `adapter_config.json`.
        parameters: how many the adapter has.
        about: what is known of the training: `data` (a name), `metrics` (numbers by name), `steps` and so on.
        serving: lines on what serving programs make of the folder.
        earlier: the text of another card of the same adapter. Its lines on the training stand instead of `about`, and
            it says where the base comes from if there is no model.
    """
    named = fields.get("base_model_name_or_path")
    origin = getattr(root, "peftlab_origin", None) or _origin_in(earlier)
    training = earlier.partition(f"\n{TRAINING}\n")[2].partition(f"\n{LOADING}\n")[0].strip()
    base = origin.get("hub") or named
    task, about = fields.get("task_type"), dict(about or {})
    known = about.pop("data", None)
    metrics = about.pop("metrics", None) or {}
    peft_opens = method in METHODS and METHODS[method].in_peft  # a config of one's own has no row
    lines = ["---"]
    if base:
        lines.append(f"base_model: {_text(base)}")
    lines.append("library_name: peft")
    if origin.get("licence"):
        lines.append(f"license: {_text(origin['licence'].lower())}")
    if task in PIPELINES:
        lines.append(f"pipeline_tag: {PIPELINES[task]}")
    tags = [f"base_model:adapter:{base}"] if base else []
    lines += ["tags:", *(f"- {_text(tag)}" for tag in (*tags, method, "peftlab")), "---", MARKER, ""]
    shown = base or (f"a {_class_name(root)} without a name" if root is not None else "a model without a name")
    lines += [
        f"# {method} adapter for {_plain(shown)}",
        "",
        f"- Base model: {_plain(shown)}" + (f" (`{origin['name']}` in PEFT Lab)" if origin else ""),
        f"- Method: {method}",
        f"- Parameters of the adapter: {parameters:,}",
    ]
    if origin.get("licence"):
        lines.append(f"- Licence of the base model: {origin['licence']}")
    lines += ["", "## Settings", "", "| setting | value |", "| --- | --- |"]
    lines += [
        f"| {name} | {_cell(_ranks(value) if name == 'rank_pattern' else value)} |"
        for name, value in sorted(fields.items())
        if name not in NOT_SETTINGS and value not in (None, [], {}, "")
    ]
    told = [f"- Data: {_plain(known) if known else 'not recorded'}"]
    told += [f"- {_plain(name)}: {_cell(value)}" for name, value in about.items()]
    if metrics:
        told += ["", "| metric | value |", "| --- | --- |"]
        told += [f"| {_plain(name)} | {_cell(value)} |" for name, value in metrics.items()]
    lines += ["", TRAINING, "", *([training] if training else told), "", LOADING, ""]
    lines += ["With `peftlab`:", "", "```python", "import peftlab as pl", ""]
    loaded = origin.get("name") or named
    config: Any = getattr(root, "config", None)
    # A base has no head of its own, so who loads it must say how many classes the adapter was trained for.
    labels = f", num_labels={config.num_labels}" if task == "SEQ_CLS" and hasattr(config, "num_labels") else ""
    lines += [
        f"model, tokenizer = pl.load_model({json.dumps(loaded)}{labels})" if loaded else "# model: the base model",
        'pl.load_adapter(model, "this/folder")',
        "```",
        "",
    ]
    if not peft_opens:
        lines.append("Hugging Face peft has no such method, so only `peftlab` can load it.")
    elif task in OPENERS and named:
        lines += [
            "With Hugging Face peft:", "", "```python", f"from peft import {OPENERS[task]}", "",
            f'model = {OPENERS[task]}.from_pretrained("this/folder"{labels})', "```",
        ]  # fmt: skip
        if Path(named).is_absolute():
            lines += [
                "",
                "This looks for the base where it was on the machine that trained the adapter. On another machine load "
                'the base yourself, and then call `peft.PeftModel.from_pretrained(base, "this/folder")`.',
            ]
    else:
        lines += [
            "With Hugging Face peft:", "", "```python", "from peft import PeftModel", "",
            'model = PeftModel.from_pretrained(base_model, "this/folder")', "```",
        ]  # fmt: skip
    if serving:
        lines += ["", "## Serving", "", *serving]
    return ("\n".join(lines) + "\n").encode()


def text_of(folder: Path) -> str:
    """Return the text of a folder's card, or nothing if it has none of ours."""
    ours = (folder / CARD).is_file() and may_write(folder)
    return (folder / CARD).read_text(encoding="utf-8") if ours else ""


def _origin_in(text: str) -> dict[str, str]:
    """Read where the base comes from in the text of a card: the reverse of what `card` writes of a model's origin."""
    base = re.search(r"^- Base model: (\S+) \(`(\S+)` in PEFT Lab\)$", text, re.MULTILINE)
    licence = re.search(r"^- Licence of the base model: (.+)$", text, re.MULTILINE)
    return {"hub": base[1], "name": base[2], "licence": licence[1] if licence else ""} if base else {}


def _class_name(root: Any) -> str:
    """The name of a model's class. `fully_shard` puts a class of its own before the real one."""
    kinds = type(root).__mro__
    return (kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]).__name__


def _text(value: object) -> str:
    """A text for YAML: as it is where that is safe, else in quotes, which JSON and YAML write alike."""
    text = str(value)
    safe = text.isascii() and text[:1].isalpha() and all(letter.isalnum() or letter in "-_./" for letter in text)
    reserved = ("null", "true", "false", "yes", "no", "on", "off")  # YAML reads these words as something else
    return text if safe and text.lower() not in reserved else json.dumps(text)


def _plain(value: object) -> str:
    """One line of text, without what Markdown would take for a table or for HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")[:300]


def _ranks(pattern: Any) -> Any:
    """Return a rank pattern with a number for each module; AdaLoRA's has a mask for each."""
    return {key: sum(value) if isinstance(value, list) else value for key, value in pattern.items()}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return _plain(json.dumps(value) if isinstance(value, (list, dict)) else value)
