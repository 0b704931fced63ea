"""Write an adapter folder again for serving programs, from the folder alone: no model is needed."""

from __future__ import annotations

import os
from pathlib import Path

from peftlab.adapters.card import text_of
from peftlab.adapters.checkpoint import (
    State,
    check_place,
    files_of,
    read_folder,
    write_adapter,
)
from peftlab.adapters.config_fields import TARGET_FIELDS, classes_of, config_class
from peftlab.adapters.injection import check_name
from peftlab.adapters.integrity import REST
from peftlab.adapters.judging import warn_of_unknown
from peftlab.adapters.key_forms import in_file_form
from peftlab.adapters.serving import portable
from peftlab.checks import checked
from peftlab.errors import PeftLabError
from peftlab.methods.lora import LoRAConfig
from peftlab.methods.lora_starts import from_weight
from peftlab.patterns import bounded

KEPT = ("peftlab_base", "peftlab_vocabulary", REST)  # of the metadata: what says which base is meant


@checked()
def export_adapter(folder: str | os.PathLike, out: str | os.PathLike, name: str = "default") -> Path:
    """Write a LoRA folder in the form that llama.cpp, vLLM and SGLang all read rightly, without loading a model.

    It is the form of `save_adapter(..., portable=True)`. Hugging Face peft and this package load it as well.

    Args:
        folder: the folder of this package or of Hugging Face peft, or its parent if the adapter lies in a subfolder of
            its name.
        out: another folder, for the portable form.

    Returns:
        The folder that was written.

    Raises:
        PeftLabError: a file is missing or damaged, the adapter has no portable form, or `out` holds the adapter itself
            or files that are no adapter's. Nothing is then written.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4, use_rslora=True))
    >>> folder = pl.save_adapter(model, "my-adapter")
    >>> folder = pl.export_adapter("my-adapter", "for-serving")
    >>> same = pl.load_adapter(pl.detach(model), "for-serving")
    >>> pl.attached(same)["default"].use_rslora
    False
    """
    check_name(name)
    out = Path(out)
    with bounded():
        saved = read_folder(Path(folder), name)
        if os.path.realpath(out) == os.path.realpath(saved.folder):
            raise PeftLabError(f"{out} holds the adapter itself. Give another folder for its portable form.")
        check_place(out)
        given = {"r": 8, "lora_alpha": 8, **saved.fields}  # peft's defaults
        config_class(given)  # refuses options that this package does not have
        if given["peft_type"] == LoRAConfig.peft_type:
            config = LoRAConfig(**LoRAConfig.from_peft(given))  # refuses wrong values, and a run that changed its base
            if from_weight(config.init):
                raise PeftLabError(
                    f"The adapter was trained with init_lora_weights={config.init!r}, and its start, which only the "
                    "base's weights give again, is not in the folder. Load it onto its base with pl.load_adapter, and "
                    "save it with pl.save_adapter(model, folder, portable=True)."
                )
        warn_of_unknown(saved.folder, saved.fields, classes_of(given), TARGET_FIELDS)
        fields, tensors = portable(given, in_file_form(saved.tensors, saved.folder))
        metadata = {key: text for key, text in saved.metadata.items() if key in KEPT}
        parameters = sum(tensor.numel() for tensor in tensors.values())
        state = State(None, LoRAConfig.method, fields, tensors, {}, {"format": "pt", **metadata}, parameters)
        contents = files_of(state, earlier=text_of(saved.folder))
    write_adapter(out, contents)
    return out
