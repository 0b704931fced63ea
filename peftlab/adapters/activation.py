"""Choose the adapters that run: one, a mixture, one for each row of a batch, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from peftlab.checks import checked, number
from peftlab.core.calls import observed
from peftlab.core.hooks import Activity, adapters_on, hosts, prompt_parts
from peftlab.core.records import Record, check_hosts, record_of, require_adapter, unwrap
from peftlab.errors import PeftLabError, some


@checked("which")
def activate(
    model: nn.Module,
    which: str | Mapping[str, float] | Sequence[str | None],
    *,
    trainable: bool | None = None,
) -> None:
    """Choose the adapters that run. Those of them that may train then train.

    With gradient checkpointing the backward pass runs the model again, so call `backward` before switching.

    Args:
        which: one of three. A name. A dict such as `{"a": 0.7, "b": 0.3}`, which adds 0.7 times what `a` changes and
            0.3 times what `b` changes (`{}` is the base alone). A list with one name, or None for the base, per row of
            the batch. If the batch has k times as many rows as names, the first k rows run the first name and so on, as
            beams and returned sequences lie. Some layers see tokens in another order than the batch's, such as the
            layers of an expert that gets its tokens from a router; rows cannot be told apart there, so activate one
            adapter. (Experts that are fused into parameters get all tokens, and are adapted row by row.) Prompts
            and prefixes are mixed by their vectors, 0.7 P_a + 0.3 P_b, so they need equal lengths. So do prompts and
            prefixes in the rows of one batch.
        trainable: whether the named adapters train. `None` changes nothing: attached adapters train, loaded ones do
            not.

    Raises:
        PeftLabError: an unknown name (with near matches), a weight that is no finite number, or a merged model.

    >>> for name in ("calm", "brisk"):
    ...     model = pl.attach(model, pl.LoRAConfig(r=4), name=name)
    >>> pl.activate(model, {"calm": 0.7, "brisk": 0.3})  # a mixture of the two
    >>> pl.activate(model, ["calm", None])  # row 0 runs an adapter, row 1 the base alone
    >>> model(torch.ones(2, 3, dtype=torch.long)).logits.shape
    torch.Size([2, 3, 32])
    """
    root = unwrap(model)
    weights: dict[str, float] = {}
    rows = None
    if isinstance(which, str):
        weights = {which: 1.0}
    elif isinstance(which, Mapping):
        weights = dict(which)
    elif isinstance(which, Sequence) and which:
        rows = tuple(which)
    else:
        raise PeftLabError(f"activate was given {which!r}; give a name, a dict of weights, or a name for each row.")
    names = list(weights) if rows is None else [name for name in dict.fromkeys(rows) if name is not None]
    for name in names:
        require_adapter(root, name)
    weights = {name: number(f"the weight of {name!r}", weight) for name, weight in weights.items()}
    record = record_of(root)
    if record is None:
        raise PeftLabError("No adapter is attached to this model; attach one first.")
    check_hosts(root)
    if record.activity.merged:
        raise PeftLabError("The model is merged; call unmerge(model) before switching adapters.")
    check_together(root, weights, rows)
    if rows is not None:
        check_rows(root, record, names)
    record.activity.weights, record.activity.rows = weights, rows
    if trainable is not None:
        record.trainable.update(dict.fromkeys(names, trainable))
    refresh_requires_grad(root, record)


def check_together(root: nn.Module, weights: dict[str, float], rows: tuple[str | None, ...] | None) -> None:
    """Refuse adapters that cannot run at once, because they make inputs of different lengths."""
    wanted = Activity()
    wanted.weights, wanted.rows = weights, rows
    for _, host in hosts(root):
        parts = adapters_on(host)
        here = {name: part.compatibility_key for name, part in prompt_parts(parts, wanted).items()}
        if rows is not None and here:
            here |= {str(name): "none" for name in rows if name not in here}
        if len(set(here.values())) > 1:
            (one, what), (other, else_) = next((a, b) for a in here.items() for b in here.items() if a[1] != b[1])
            raise PeftLabError(
                f"{one!r} has {what} and {other!r} has {else_}, so they cannot run "
                f"{'in one batch' if rows is not None else 'at once'}: inputs and caches would differ in length. "
                "Activate adapters of one kind and length, or one at a time."
            )


def check_rows(root: nn.Module, record: Record, names: Sequence[str]) -> None:
    """Refuse an adapter for each row on layers that do not have the batch as their first dimension."""
    if record.without_rows is None:
        calls = observed(root)
        record.without_rows = calls.without_rows if calls is not None else frozenset()
    wrong = [path for name in names for path in record.placed[name] if path in record.without_rows]
    if wrong:
        raise PeftLabError(
            f"{type(root).__name__} calls {some(wrong)} with a tensor that does not have the batch as its first "
            "dimension, so an adapter for each row would change other rows. Activate one adapter for the whole batch."
        )


def refresh_requires_grad(root: nn.Module, record: Record) -> None:
    """Let exactly the active adapters' trainable parameters train, and none while the model is merged."""
    activity = record.activity
    active = set(activity.weights if activity.rows is None else activity.rows)
    for _, host in hosts(root):
        for name, parts in adapters_on(host).items():
            parts.requires_grad_(name in active and record.trainable[name] and not activity.merged)
            for part in adapters_on(host).parts_of(name).values():
                for own in part.frozen:
                    part.get_parameter(own).requires_grad_(False)


@checked()
@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base alone inside the block. After it the adapters run as before.

    Raises:
        PeftLabError: the model is merged, so its weights are not the base's.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4, init="random"))
    >>> tokens = torch.ones(1, 3, dtype=torch.long)
    >>> adapted = model(tokens).logits
    >>> with pl.disabled(model):
    ...     base = model(tokens).logits
    >>> torch.equal(adapted, base)
    False
    """
    record = record_of(unwrap(model))
    if record is None:
        yield model
        return
    if record.activity.merged:
        raise PeftLabError("The model is merged, so it cannot give the base's output; call unmerge(model) first.")
    before, record.activity.enabled = record.activity.enabled, False
    try:
        yield model
    finally:
        record.activity.enabled = before
