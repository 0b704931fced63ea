"""Hold weights in four bits: code books, block-wise quantisation, a frozen linear layer, and whole models.

    model            quantize_model, dequantize_model: in place, one layer at a time
    storing          save a 4-bit base and load it, in bitsandbytes' keys
    preparing        what to do to a model before training it, each step by choice
       linear        the frozen layer: forward and backward by dequantisation
       weights       a quantised parameter, whoever made it
          backends   the reference, Triton kernels (`triton_kernels`), and bitsandbytes'
             blockwise, codebooks, serialised

Arrows point down. `peftlab` names what a user needs; the rest is here to be read.
"""

from peftlab.checks import checked
from peftlab.quantization import blockwise, codebooks
from peftlab.quantization.blockwise import Quantized, QuantState, quantize, quantize_nf4
from peftlab.quantization.codebooks import FORMATS, dynamic_map
from peftlab.quantization.linear import Linear4bit

# A layer's forward calls these too, and needs no check of its arguments.
code_book, dequantize = checked()(codebooks.code_book), checked()(blockwise.dequantize)

__all__ = [
    "FORMATS", "Linear4bit", "QuantState", "Quantized", "code_book", "dequantize", "dynamic_map", "quantize",
    "quantize_nf4",
]  # fmt: skip
