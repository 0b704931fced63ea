"""Exercises of the chapter on QLoRA and NF4."""

from peftlab.kit.exercises.grading import Exercise, choice, function, number

# Llama-2-70B: numbers in the linear layers of its body, and in the embedding and the output head together
BODY, ENDS = 68_451_041_280, 524_288_000


def _bits(block, scale_bits=8, scale_block=256, nested_bits=32):
    """Return the bits per weight: 4, its share of a scale, and that scale's share of a second scale."""
    return 4 + scale_bits / block + nested_bits / (block * scale_block)


def _codes(block, book):
    """Divide each weight by the block's largest magnitude, and return the index of the nearest value of the book."""
    scaled = block / block.abs().max()
    return (scaled[:, None] - book[None, :]).abs().argmin(1)


def _code_cases():
    import torch

    from peftlab.quantization import code_book

    generator = torch.Generator().manual_seed(3)
    books = (code_book("nf4"), code_book("int4")[:15])
    return [(torch.randn(64, generator=generator) * scale, book.clone()) for book in books for scale in (0.02, 3.0)]


def _backward(gradient, codes, book, scales):
    """Return dL/dx = dL/dy W with W = book[codes] * scales, one scale per row."""
    return gradient @ (book[codes] * scales[:, None])


def _backward_cases():
    import torch

    from peftlab.quantization import code_book

    generator = torch.Generator().manual_seed(4)
    book = code_book("nf4").double()

    def case(rows, out, inside):
        codes = torch.randint(0, 16, (out, inside), generator=generator)
        scales = torch.rand(out, generator=generator, dtype=torch.float64) + 0.1
        return torch.randn(rows, out, generator=generator, dtype=torch.float64), codes, book, scales

    return [case(3, 5, 7), case(2, 6, 6), case(1, 4, 9)]


EXERCISES = (
    Exercise("qlora.bits", "easy", 5, "a number", number(
        _bits(128), tolerance=1e-4,
        near={_bits(64): "That is the block of 64; here it is 128.",
              4 + 32 / 128: "That is with scales in float32; double quantisation stores them in 8 bits.",
              4 + 8 / 128: "Nearly all of it: 256 scales share a float32 scale of their own.",
              4.0: "The scales take room too."},
        hint="Four bits, an eighth-bit scale shared by 128 weights, and a float32 scale shared by 256 of those.",
        then="Twice the block saves a sixteenth of a bit, and costs accuracy.")),
    Exercise("qlora.memory", "easy", 5, "a number of GB (1e9 bytes)", number(
        (BODY * _bits(64) / 8 + 2 * ENDS) / 1e9, tolerance=0.005,
        near={(BODY + ENDS) * _bits(64) / 8 / 1e9: "The embedding and the output head are not quantised: 2 bytes each.",
              BODY * _bits(64) / 8 / 1e9: "The embedding and the output head are missing.",
              (BODY * 4.5 / 8 + 2 * ENDS) / 1e9: "That is without double quantisation.",
              (BODY * 4 / 8 + 2 * ENDS) / 1e9: "The scales take room too.",
              (BODY * _bits(64) + 16 * ENDS) / 1e9: "Those are bits; a byte has eight."},
        hint="Bits a parameter over eight for the quantised part, two bytes for the rest; divide by 1e9.",
        then="What is left of a card of 48 GB is for everything else.")),
    Exercise("qlora.states", "medium", 5, "a number of GB (1e9 bytes)", number(
        40e6 * 6 / 1e9, tolerance=0.01,
        near={40e6 * 8 / 1e9: "That is all of the states; 8-bit states still take 2 bytes.",
              40e6 * 2 / 1e9: "That is what 8-bit states take, not what they save.",
              7e9 * 6 / 1e9: "Only trained parameters have states."},
        hint="AdamW keeps two states a trained parameter: 4 bytes each, or 1.",
        then="The 10 to 15 GB that one reads of belong to full fine-tuning.")),
    Exercise("qlora.codes", "medium", 10, "your function", function(
        _codes, cases=_code_cases,
        near={"Scale by the largest magnitude of the block, not by its largest value.":
                  lambda block, book: ((block / block.max())[:, None] - book).abs().argmin(1),
              "That scales by the standard deviation: the book's ends are at plus and minus one.":
                  lambda block, book: ((block / block.std())[:, None] - book).abs().argmin(1),
              "The weights must be divided by the block's scale first.":
                  lambda block, book: (block[:, None] - book).abs().argmin(1)},
        hint="Divide by the block's largest magnitude; then compare each weight with all values of the book.",
        then="bitsandbytes gives the same codes.")),
    Exercise("qlora.backward", "medium", 10, "your function", function(
        _backward, cases=_backward_cases,
        near={"That is the forward product: y = x W^T, but dL/dx = dL/dy W.":
                  lambda gradient, codes, book, scales: gradient @ (book[codes] * scales[:, None]).mT
                  if codes.shape[0] == codes.shape[1] else gradient @ (book[codes] * scales[:, None]),
              "The scales are missing: codes alone are values between -1 and 1.":
                  lambda gradient, codes, book, scales: gradient @ book[codes]},
        hint="Look the codes up, multiply each row by its scale, and you have W of shape (out, in).",
        then="No 16-bit copy was kept: W was made from codes, and thrown away.")),
    Exercise("qlora.merge", "easy", 5, '"merge", "requantize" or "dequantize"', choice(
        "dequantize", options=("merge", "requantize", "dequantize"),
        remarks={"merge": "Merging into a 4-bit base is refused: most of a small update would be lost.",
                 "requantize": "That rounds the sum to sixteen values a block, and an update smaller than the distance "
                               "between two of them becomes noise."},
        hint="Which order of the two operations keeps the update?",
        then="Dequantise first, then merge, and ship 16 bits.")),
)
