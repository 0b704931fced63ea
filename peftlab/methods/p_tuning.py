"""Make a prompt P with a small network, so that its vectors move together.

    P = MLP(E),          E, P: (n, d),    MLP: d -> h -> h -> d with ReLU between
    P = MLP(LSTM(E)),    LSTM: d -> 2 h (two directions),    MLP: 2 h -> 2 h -> d with ReLU between

`InFront` in `methods/in_front.py` puts P in front of the input. Only P is needed after training, and Hugging Face's
format stores only P.

Paper: Liu et al., *GPT Understands, Too*, 2021, arXiv:2103.10385, section 3, which has the second form. Hugging Face
peft has both.
Book: section 4.7, "P-tuning, and the three side by side".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftlab.checks import check_fields, number, one_of, whole
from peftlab.core.interface import Placement
from peftlab.methods.in_front import prompt_parts
from peftlab.methods.virtual import Table, VirtualTokens, submodules, word_embeddings


class PromptEncoder(nn.Module):
    """Make the prompt P, (n, d), from learned vectors E of the same shape.

    Attributes:
        embedding: E, (n, d).
        lstm_head: None for the MLP alone.
        mlp_head: d -> h -> h -> d, or 2 h -> 2 h -> d after the LSTM.
    """

    def __init__(self, rows: Tensor, config: PTuningConfig) -> None:
        super().__init__()
        d = rows.shape[1]
        h = config.encoder_hidden or d
        self.embedding = nn.Parameter(rows)
        self.lstm_head = None
        if config.encoder == "lstm":
            dropout = config.encoder_dropout if config.encoder_layers > 1 else 0.0  # no dropout after the last layer
            self.lstm_head = nn.LSTM(d, h, config.encoder_layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            self.mlp_head = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))

    def forward(self) -> Tensor:
        """Return P = MLP(E), or MLP(LSTM(E))."""
        rows = self.embedding
        if self.lstm_head is not None:
            rows = self.lstm_head(rows[None])[0][0]
        return self.mlp_head(rows)


ENCODERS = ("mlp", "lstm", "none")


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(VirtualTokens):
    """Say how many vectors a prompt has and which network makes them.

    Attributes:
        num_virtual_tokens, modules_to_save, task_type: as for every method with virtual tokens.
        encoder: `"mlp"`, `"lstm"` (two directions, then an MLP of two layers), or `"none"`, which trains the prompt
            itself. A saved adapter holds only the prompt.
        encoder_hidden: h, the inner width of the encoder; None for the model's width.
        encoder_layers: the number of layers of the LSTM.
        encoder_dropout: the dropout between the layers of the LSTM in training; in [0, 1).

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.PTuningConfig(num_virtual_tokens=4, encoder_hidden=8))
    >>> pl.count_parameters(model).trainable
    416
    """

    encoder: str = "mlp"
    encoder_hidden: int | None = None
    encoder_layers: int = 2
    encoder_dropout: float = 0.0

    method: ClassVar[str] = "p-tuning"
    peft_type: ClassVar[str] = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, one_of, "encoder", known=ENCODERS)
        check_fields(self, whole, "encoder_hidden", least=1, optional=True)
        check_fields(self, whole, "encoder_layers", least=1)
        check_fields(self, number, "encoder_dropout", least=0, below=1)

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield the prompt in front of the input, and the copies of heads."""
        d, n = word_embeddings(model).embedding_dim, self.num_virtual_tokens
        rows = torch.randn(n * submodules(model), d)
        source = Table(rows) if self.encoder == "none" else PromptEncoder(rows, self)
        yield from prompt_parts(model, source, n)
        yield from self.task_heads(model)

    def as_stored(self) -> Self:
        """Return the config of what an adapter folder holds: the prompt without its encoder."""
        return replace(self, encoder="none")

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` for P-tuning."""
        return {
            **self.shared_fields(model),
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.encoder_hidden or word_embeddings(model).embedding_dim,
            "encoder_num_layers": self.encoder_layers,
            "encoder_dropout": self.encoder_dropout,
        }

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        return {
            "num_virtual_tokens": fields.get("num_virtual_tokens"),
            "encoder": str(fields.get("encoder_reparameterization_type") or "MLP").lower(),
            "encoder_hidden": fields.get("encoder_hidden_size"),
            "encoder_layers": fields.get("encoder_num_layers", 2),
            "encoder_dropout": fields.get("encoder_dropout", 0.0),
        }
