"""Plain modules that the tests of adapters share, and what "the model is as it was" means, in one place."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Block(nn.Module):
    """A residual block of odd widths: Linear, LayerNorm, Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 11)
        self.down = Conv1D(6, 11)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Tokens (batch, length) to logits (batch, 5): Embedding, two blocks, a head."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 5)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5)
        self.to(dtype)  # last, so that models of all dtypes are one model rounded

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def tokens(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 13, (rows, 7), generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict:
    """Everything that attaching could leave behind: weights, flags, hooks, children, attributes, classes, modes."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "order": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "pointers": [parameter.data_ptr() for parameter in model.parameters()],
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": [(path, type(module), module.training) for path, module in model.named_modules()],
        "hooks": [
            {name: dict(table) for name, table in vars(module).items() if "hooks" in name and table is not None}
            for module in model.modules()
        ],
        "attributes": [
            {
                name: repr(value)
                for name, value in vars(module).items()
                if not name.startswith(("_para", "_modu", "_buf"))
            }
            for module in model.modules()
        ],
        "keys": [sorted(vars(module)) for module in model.modules()],
    }


def assert_same(before: dict, after: dict) -> None:
    """Requires two snapshots to be equal, bit for bit."""
    assert list(before["state"]) == list(after["state"])
    for key, value in before["state"].items():
        assert torch.equal(value, after["state"][key]), key
    for part in before:
        if part != "state":
            assert before[part] == after[part], part
