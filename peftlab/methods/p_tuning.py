"""P-tuning: a prompt whose vectors a small network makes, so that they move together.

Liu et al., *GPT Understands, Too*, 2021, arXiv:2103.10385, section 3. There the network is an LSTM with an MLP on top,
here, as in Hugging Face peft, that or an MLP of three layers:

    P = MLP(E),    E: (n, d);   MLP: d -> h -> h -> d with ReLU between

Only P is needed once it is trained, and only P is stored in Hugging Face's format.
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

ENCODERS = ("mlp", "lstm", "none")


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(VirtualTokens):
    """A prompt that a network makes.

    Attributes:
        num_virtual_tokens, modules_to_save, task_type: as for every method with virtual tokens.
        encoder: `"mlp"`, `"lstm"` (two directions, then an MLP of two layers), or `"none"`: the prompt itself, which is
            what a saved adapter holds.
        encoder_hidden: inner width h of the encoder; None for the model's width.
        encoder_layers: layers of the LSTM.
        encoder_dropout: between the layers of the LSTM, while training; in [0, 1).

    Raises:
        PeftLabError: a value that is out of range, with what was found.
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
        """Yields the prompt in front of the input, and the copies of heads."""
        d, n = word_embeddings(model).embedding_dim, self.num_virtual_tokens
        rows = torch.randn(n * submodules(model), d)
        source = Table(rows) if self.encoder == "none" else PromptEncoder(rows, self)
        yield from prompt_parts(model, source, n)
        yield from self.task_heads(model)

    def as_stored(self) -> Self:
        """The config of what an adapter folder holds: the prompt without its encoder."""
        return replace(self, encoder="none")

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The fields of Hugging Face's `adapter_config.json` for P-tuning."""
        return {
            **self.shared_fields(model),
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.encoder_hidden or word_embeddings(model).embedding_dim,
            "encoder_num_layers": self.encoder_layers,
            "encoder_dropout": self.encoder_dropout,
        }

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """The reverse of `to_peft`: the keyword arguments for this class."""
        return {
            "num_virtual_tokens": fields.get("num_virtual_tokens"),
            "encoder": str(fields.get("encoder_reparameterization_type") or "MLP").lower(),
            "encoder_hidden": fields.get("encoder_hidden_size"),
            "encoder_layers": fields.get("encoder_num_layers", 2),
            "encoder_dropout": fields.get("encoder_dropout", 0.0),
        }


class PromptEncoder(nn.Module):
    """Makes the prompt, (n, d), from learned vectors of the same shape.

    Attributes:
        embedding: (n, d). lstm: None for the MLP. mlp: d -> h -> h -> d, or 2 h -> 2 h -> d behind the LSTM.
    """

    def __init__(self, rows: Tensor, config: PTuningConfig) -> None:
        super().__init__()
        d = rows.shape[1]
        h = config.encoder_hidden or d
        self.embedding = nn.Parameter(rows)
        self.lstm_head = None
        if config.encoder == "lstm":
            dropout = config.encoder_dropout if config.encoder_layers > 1 else 0.0  # there is no layer after the last
            self.lstm_head = nn.LSTM(d, h, config.encoder_layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            self.mlp_head = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))

    def forward(self) -> Tensor:
        """P = MLP(E), or MLP(LSTM(E))."""
        rows = self.embedding
        if self.lstm_head is not None:
            rows = self.lstm_head(rows[None])[0][0]
        return self.mlp_head(rows)
