"""What each of two processes does that train one model together."""

import tiny
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import peftlab as pl
from peftlab.core.records import placed
from peftlab.training import train

SETTINGS = {"epochs": 1, "batch_size": 4, "accumulation": 2, "learning_rate": 0.05, "optimizer": "sgd", "save_every": 1}
EXAMPLES = 21  # the last batch leaves one process without an example of its own


def run(rank, rendezvous, folder):
    """The weights of the trained model and the loss of each step, as arrays; and the same of packed rows."""
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    packed = trained(None, packing=True)
    pruned = {f"adalora {name}": value for name, value in adalora(DistributedDataParallel).items()}
    return {**trained(folder), **{f"packed {name}": value for name, value in packed.items()}, **pruned}


def adalora(wrap=lambda model: model):
    """The weights and the masks of an adapter that was pruned in the run."""
    torch.manual_seed(5)
    model = pl.attach(tiny.llama(dtype=torch.float64), pl.AdaLoRAConfig(init_r=4, target_r=2))
    train(wrap(model), tiny.examples(EXAMPLES), **{**SETTINGS, "epochs": 3, "optimizer": "adamw"})
    kept = {path: part.kept.numpy() for path, _, part in placed(model, "default")}
    return kept | {name: value.detach().numpy() for name, value in model.named_parameters() if "peftlab" in name}


def trained(folder, **settings):
    model = tiny.llama()
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    wrapped = DistributedDataParallel(model)
    history = train(
        wrapped,
        tiny.examples(EXAMPLES),
        evaluation_data=tiny.examples(3, seed=1),
        evaluate_every=2,
        folder=folder,
        **SETTINGS,
        **settings,
    )
    losses = torch.tensor([row["loss"] for row in history.steps], dtype=torch.float64)
    return {**{name: value.detach().numpy() for name, value in model.named_parameters()}, "losses": losses.numpy()}
