"""Tell Hugging Face peft's task type from a model's class, so that a saved folder opens in its `AutoPeftModel...`."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn

from peftlab.core.targets import TASK_HEADS

ENDINGS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type_of(root: nn.Module, copied: Collection[str]) -> str | None:
    """Return peft's name of a model's task; None where the class does not tell, or where peft would expect more.

    Args:
        copied: paths of the modules that the adapter trains in full. peft's classes for classification look for the
            model's head among them, so a task with a head is only named when that head is there.
    """
    if getattr(root, "main_input_name", None) != "input_ids":
        return None  # peft's classes for a task pass input_ids, and a model of speech or images has none
    names = [kind.__name__ for kind in type(root).__mro__]  # a person's own class may stand on one of transformers
    for name in names:
        for ending, task in ENDINGS.items():
            if name.endswith(ending):
                encoder_decoder = bool(getattr(root.config, "is_encoder_decoder", False))
                if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
                    return task if encoder_decoder == (task == "SEQ_2_SEQ_LM") else None
                heads = {path for path, _ in root.named_modules() if path.endswith(TASK_HEADS[task])}
                return task if heads and heads <= set(copied) else None
    # peft's class passes inputs_embeds too, which CLIP does not take
    reads = "inputs_embeds" in inspect.signature(type(root).forward).parameters
    return "FEATURE_EXTRACTION" if reads and getattr(root, "base_model", None) is root else None
