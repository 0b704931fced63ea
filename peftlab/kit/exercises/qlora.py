"""Exercises of the chapter on QLoRA and NF4."""

import math

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


def _pack(codes):
    """Put two codes into each byte, the first into its high half."""
    return codes[0::2] * 16 + codes[1::2]


def _pack_cases():
    import torch

    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(0, 16, (n,), generator=generator),) for n in (2, 8, 64)]


def _share_of_zero(below=-0.0911, above=0.0796, scale=2.55, cut=0.5):
    """Return the percentage of normal weights between the middles beside zero; the scale is in standard deviations."""
    return 100 * (_below(cut * above * scale) - _below(cut * below * scale))


def _below(z):
    """Return the share of the normal distribution below z."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


EXERCISES = (
    Exercise("qlora.bits", "easy", 5, "a number", number(
        _bits(128), tolerance=1e-4,
        near={_bits(64): "That is the block of 64; here it is 128.",
              4 + 32 / 128: "That is with scales in float32. Double quantisation stores them in 8 bits.",
              4 + 8 / 128: "That is nearly all. But 256 scales share one float32 scale, and its bits count too.",
              4 + 8 / 128 + 32 / 256: "The second scale is shared by 256 blocks, so by 256 times 128 weights.",
              4.0: "The scales take room too: 8 bits for each block."},
        hint="Add three parts: four bits for the code, an 8-bit scale shared by 128 weights, and a float32 scale "
             "shared by 256 of those scales.",
        then="A block twice as long saves a sixteenth of a bit and loses a little accuracy.")),
    Exercise("qlora.memory", "easy", 5, "a number of GB (1e9 bytes)", number(
        (BODY * _bits(64) / 8 + 2 * ENDS) / 1e9, tolerance=0.005,
        near={(BODY + ENDS) * _bits(64) / 8 / 1e9: "The embedding and the output head are not quantised: 2 bytes each.",
              BODY * _bits(64) / 8 / 1e9: "The embedding and the output head are missing.",
              (BODY * 4.5 / 8 + 2 * ENDS) / 1e9: "That is without double quantisation.",
              (BODY * 4 / 8 + 2 * ENDS) / 1e9: "The scales take room too.",
              (BODY * _bits(64) + 16 * ENDS) / 1e9: "Those are bits; a byte has eight."},
        hint="Bits per parameter over eight for the quantised part, two bytes for the rest. Divide by 1e9.",
        then="What is left of a 48 GB card must hold everything else.")),
    Exercise("qlora.states", "easy", 5, "a number of GB (1e9 bytes)", number(
        40e6 * 6 / 1e9, tolerance=0.01,
        near={40e6 * 8 / 1e9: "That is all of the states; 8-bit states still take 2 bytes.",
              40e6 * 2 / 1e9: "That is what 8-bit states take, not what they save.",
              40e6 * 3 / 1e9: "That is one state. AdamW keeps two per parameter.",
              7e9 * 6 / 1e9: "Only trained parameters have states. The frozen ones have none.",
              40e6 * 6 / 1e6: "Those are megabytes; a gigabyte is 1e9 bytes."},
        hint="AdamW keeps two states per trained parameter. Each takes 4 bytes in float32 and 1 byte in 8 bits.",
        then="The 10 to 15 GB that people write of belong to full fine-tuning.")),
    Exercise("qlora.pack", "easy", 10, "your function", function(
        _pack, cases=_pack_cases,
        near={"You put the first code into the low half. Try the codes 1 and 2: the byte should be 0x12, and yours is "
              "0x21.": lambda codes: codes[1::2] * 16 + codes[0::2],
              "You paired the first half of the codes with the second half. Neighbours share a byte.":
                  lambda codes: codes[: len(codes) // 2] * 16 + codes[len(codes) // 2 :],
              "Half a byte has 16 values, from 0 to 15, so the high half counts 16 times.":
                  lambda codes: codes[0::2] * 15 + codes[1::2],
              "You added the two codes. Then 1 and 2 give the same byte as 2 and 1.":
                  lambda codes: codes[0::2] + codes[1::2]},
        hint="Take every second code from the first on, times 16, and add every second code from the second on.",
        then="bitsandbytes stores its codes in the same way.")),
    Exercise("qlora.codes", "medium", 10, "your function", function(
        _codes, cases=_code_cases,
        near={"Scale by the largest magnitude of the block, not by its largest value.":
                  lambda block, book: ((block / block.max())[:, None] - book).abs().argmin(1),
              "That scales by the standard deviation: the book's ends are at plus and minus one.":
                  lambda block, book: ((block / block.std())[:, None] - book).abs().argmin(1),
              "The weights must be divided by the block's scale first.":
                  lambda block, book: (block[:, None] - book).abs().argmin(1),
              "That is absmax/7, as in the article. The book ends at 1, and your scaled weights reach 7.":
                  lambda block, book: ((block / block.abs().max() * 7)[:, None] - book).abs().argmin(1)},
        hint="Divide by the block's largest magnitude. Then compare each weight with all values of the book.",
        then="bitsandbytes gives the same codes.")),
    Exercise("qlora.share", "medium", 10, "a number in percent", number(
        _share_of_zero(), tolerance=0.005,
        near={_share_of_zero() / 100: "Give it in percent.",
              _share_of_zero(cut=1): "You went up to the neighbours themselves. A weight goes to the nearest value, so "
                                     "zero's range ends half-way to each neighbour.",
              _share_of_zero(scale=1): "The middles are in units of the block's scale. Multiply them by 2.55 to have "
                                       "them in standard deviations.",
              _share_of_zero(scale=1 / 2.55): "You divided by 2.55. A scaled weight of 1 is 2.55 standard deviations, "
                                              "so multiply.",
              _share_of_zero(scale=1.848): "That is with 1.85 standard deviations, where the recipe puts the end. The "
                                           "scale of a real block of 64 is larger.",
              6.25: "That would be so if all values were used equally. The scale prevents it."},
        hint="Find the middles between zero and its neighbours, multiply them by 2.55, and take the share of the "
             "normal distribution between them: torch.special.ndtr(z) is the share below z.",
        then="So zero is used more often than a sixteenth.")),
    Exercise("qlora.backward", "medium", 10, "your function", function(
        _backward, cases=_backward_cases,
        near={"That is the forward product: y = x W^T, but dL/dx = dL/dy W.":
                  lambda gradient, codes, book, scales: gradient @ (book[codes] * scales[:, None]).mT
                  if codes.shape[0] == codes.shape[1] else gradient @ (book[codes] * scales[:, None]),
              "The scales are missing: codes alone are values between -1 and 1.":
                  lambda gradient, codes, book, scales: gradient @ book[codes]},
        hint="Look the codes up in the book and multiply each row by its scale. That is W, of shape (out, in).",
        then="No copy of W was kept: it was made from codes and thrown away.")),
    Exercise("qlora.rounded", "medium", 10, "a number in percent", number(
        9.4 * math.sqrt(2), tolerance=0.005,
        near={9.4: "That is the share of the sum. The sum is longer than the update.",
              18.8: "Lengths of unrelated vectors do not add. Their squares do.",
              9.4 / math.sqrt(2): "You divided by the square root of 2. The sum is longer than the update, so more is "
                                  "lost.",
              0.094 * math.sqrt(2): "Give it in percent."},
        hint="NF4 loses 9.4% of the sum W + update. How long is the sum, if both are equally long and unrelated?",
        then="And that is a huge update. A small one drowns in an error as long as itself.")),
    Exercise("qlora.merge", "easy", 5, '"merge", "requantize" or "dequantize"', choice(
        "dequantize", options=("merge", "requantize", "dequantize"),
        remarks={"merge": "Merging into a 4-bit base is refused: most of a small update would be lost.",
                 "requantize": "That rounds the sum to sixteen values a block, and an update smaller than the distance "
                               "between two of them becomes noise."},
        hint="Which order of the two operations keeps the update?",
        then="Dequantise first, then merge, and ship 16 bits.")),
)
