"""Load a model and its tokenizer: by a name of this book, from a local folder, or by a hub id."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from peftlab import checks
from peftlab.assets.catalogue import catalogue
from peftlab.assets.fetch import ensure
from peftlab.checks import checked, whole
from peftlab.errors import PeftLabError, did_you_mean, near_matches, out_of_memory, warn
from peftlab.foreign import check_code, read_fields

# transformers would put an adapter that lies beside a model into it, and unpickle it; that is for load_adapter
NO_ADAPTER = {"subfolder": "no-adapter"}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
MOST_LABELS = 1_000_000
PRETRAINING = ("ForMaskedLM", "ForPreTraining", "ForMaskedImageModeling")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@checked()
def load_model(
    name: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Load a pre-trained model, in eval mode, and its tokenizer.

    Args:
        name: `"smollm2-135m"` or `"minilm"` (fetched at the first use, then read from the cache without a network), or
            the path of a folder that `save_pretrained` wrote, or a hub id such as `"org/model"`.
        num_labels: add a new classification head with this many outputs, as transformers does.
        dtype: the dtype of the weights, such as `torch.bfloat16` or `"bfloat16"`. By default that of the stored weights
            (float32 for the names above).
        device: where to put the model, such as `"cuda"`. By default the CPU.

    With `num_labels` the model is one for sequence classification. Otherwise its class is the one that was saved, with
    the heads that were trained: a decoder for causal language modelling, an encoder-decoder for sequence-to-sequence, a
    model of text and images for both. Two classes are changed: a masked language model is loaded without its head, and
    an encoder-decoder without a head for sequence-to-sequence.

    The second thing returned is the tokenizer, also for a model of images or sound. The processor that prepares these
    comes from `transformers.AutoProcessor`. A model without a tokenizer is not loaded; the error says how to go on.

    Only safetensors are read. No code from a repository is ever run.

    Raises:
        PeftLabError: the name is not known, the weights cannot be read, there is no tokenizer, or the device does not
            exist.

    >>> small, words = pl.load_model("smollm2-135m")
    >>> type(small).__name__, words.decode(words("a kettle")["input_ids"])
    ('LlamaForCausalLM', 'a kettle')
    """
    dtype, device = _dtype(dtype), None if device is None else checks.device(device, torch)
    name = str(name)
    source = _source(name)
    options = {} if dtype is None else {"dtype": dtype}
    if num_labels is not None:
        options["num_labels"] = num_labels = whole("num_labels", num_labels, least=1, ceiling=MOST_LABELS)
    with quiet():
        try:
            check_code(f"The config of {str(name)!r}", _fields(source))
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            kind = _model_class(config, num_labels)
            tokenizer = _tokenizer(name, source, kind)
            model, report = kind.from_pretrained(
                source,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                adapter_kwargs=NO_ADAPTER,
                **options,
            )
        except Exception as error:  # a malformed folder makes anything of transformers' own code
            if isinstance(error, PeftLabError) or out_of_memory(error) is not None:
                raise
            raise PeftLabError(_load_fault(name, error)) from error
    _warn_about_missing(name, model, report)
    if name in catalogue():  # for the model card of an adapter; the config names the folder, which loads again
        entry = catalogue()[name]
        licence = entry.get("licence", "").split(" (")[0]
        model.peftlab_origin = {"name": str(name), "hub": entry.get("hub"), "licence": licence}
    return model.eval() if device is None else model.eval().to(device), tokenizer


def _fields(source: str) -> dict[str, Any]:
    """The config of a folder or a hub id as it is written, before anything is made of it."""
    file = Path(source) / "config.json"
    if file.is_file():
        return read_fields(file, infinite=True)
    return transformers.PretrainedConfig.get_config_dict(source)[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and load reports inside the block, then restore the user's settings.

    The hub's download bars are not silenced, because people who wait for gigabytes want to see them move.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if hub_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not hub_bars:
            disable_progress_bars()


def _source(name: str) -> str:
    """Return what to pass to `from_pretrained` for `name`: a folder or a hub id."""
    known = catalogue()
    models = [known_name for known_name, found in known.items() if found["kind"] != "dataset"]
    if name in models:
        return str(ensure(name))
    if name in known or name == "support-desk":
        raise PeftLabError(f"{name!r} is a data set: use load_data({name!r}). Models: {', '.join(models)}.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
            raise PeftLabError(f"{folder} holds an adapter: load its base model, then use load_adapter on that.")
        return str(folder)
    odd = not HUB_ID.fullmatch(name) or ".." in name
    if name.startswith((".", "/", "~")) or ("/" in name and odd) or "\\" in name:
        raise PeftLabError(f"There is no folder {name!r}.")
    # A single word may be an old hub id ("gpt2"), unless it looks like a misspelt name of ours.
    if "/" not in name and (odd or near_matches(name, models) or not _on_hub(name)):
        raise PeftLabError(
            f"There is no model {name!r}.{did_you_mean(name, models)} Known: {', '.join(models)}; "
            'else give the path of a folder, or a hub id such as "org/model".'
        )
    return name


def _on_hub(name: str) -> bool:
    """Say whether the hub, or its local cache, has a model of this name. Ask once, with a short timeout."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    try:
        HfApi().model_info(name, timeout=5)
    except Exception:  # not found, no network, offline mode, an odd name: the caller need not know which
        return False
    return True


def _model_class(config: transformers.PretrainedConfig, num_labels: int | None) -> Any:
    """Return the class that fits a config: the one that was saved, or an auto class."""
    if num_labels is not None:
        return transformers.AutoModelForSequenceClassification
    saved, headless = _saved_class(config), transformers.MODEL_MAPPING.get(type(config), None)
    seq2seq = type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and config.is_encoder_decoder
    if saved is not None and not (seq2seq and saved is headless):
        return saved
    if seq2seq:
        return transformers.AutoModelForSeq2SeqLM
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return transformers.AutoModelForCausalLM
    if not architecture and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModel


def _saved_class(config: transformers.PretrainedConfig) -> Any:
    """Return transformers' class that a config says was saved; None for a head that only pre-training needs."""
    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return None
    built_from = getattr(found, "config_class", None)
    fits = built_from is not None and isinstance(config, built_from)
    return found if fits and not name.endswith(PRETRAINING) else None


def _tokenizer(name: str, source: str, kind: Any) -> Any:
    """Return the tokenizer beside a model, or say that a model has none."""
    reads_text = getattr(kind, "main_input_name", "input_ids") == "input_ids"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:
        if reads_text:
            raise
        tokenizer = None
    # Where no file of a tokenizer is, transformers makes some kinds from nothing: they know their special tokens alone.
    if tokenizer is not None and len(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, "\u2581"}) > 0:
        return tokenizer
    if reads_text:
        raise PeftLabError(
            f"{str(name)!r} holds no tokenizer. Save the model's own there, with tokenizer.save_pretrained(folder)."
        )
    raise PeftLabError(
        f"{str(name)!r} holds a {kind.__name__} and no tokenizer, and load_model loads models that read or write "
        f"text. Load it with transformers.{kind.__name__}.from_pretrained({str(name)!r}); attach takes it as it is."
    )


def _warn_about_missing(name: str, model: transformers.PreTrainedModel, report: dict) -> None:
    """Warn about weights that the checkpoint lacks and that are random now. For a new head this is normal."""
    prefix = model.base_model_prefix + "."
    headless = model.base_model is model
    lost = sorted(key for key in report["missing_keys"] if headless or key.startswith(prefix))
    if lost:
        more = "" if len(lost) == 1 else f" and {len(lost) - 1} more"
        warn(f"{name}: the checkpoint has no {lost[0]}{more}; random values were put there.")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, SHORT.get(dtype, dtype), None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PeftLabError(f'dtype must be "float32", "bfloat16", "float16", "auto" or a torch dtype, not {dtype!r}.')
    return found


def _load_fault(name: str, error: Exception) -> str:
    """Return one line for a person, made from the error of transformers."""
    text = " ".join(str(error).split())
    name = str(name)
    if (Path(name).expanduser() / "adapter_config.json").is_file():
        return (
            f"{name} holds an adapter beside the model, and transformers {transformers.__version__} cannot load the "
            "model without it. Move adapter_config.json away, load the model, and give the adapter to load_adapter."
        )
    if "Unrecognized configuration class" in text:
        kind = re.search(r"configuration class <class '[\w.]*?(\w+)'>", text)
        return (
            f"{name!r} has a {kind.group(1) if kind else 'config'}, for which transformers has no class of this task. "
            "Leave num_labels out."
        )
    if "trust_remote_code" in text:
        return f"{name!r} needs Python code from its repository, and peftlab never runs such code."
    if "safetensors" in text and Path(name).expanduser().is_dir():
        return f"{name} has no weights as safetensors, and peftlab reads no pickled ones ({text[:200]})."
    return f"{name!r} cannot be loaded: {text[:400]}"
