"""Exercises of the chapter on memory."""

from peftlab.kit.exercises.grading import Exercise, choice, function, number


def _frozen(h, k, m, n, tokens):
    """Return 12 h + 4 k + 6 m + 4 n + 8 bytes per token: the block without the inputs that only weights need."""
    return tokens * (12 * h + 4 * k + 6 * m + 4 * n + 8)


def _block_cases():
    return [(4096, 4096, 11008, 32, 512), (2048, 512, 8192, 32, 7), (576, 192, 1536, 9, 1)]


def _longest(card, weights, per_token):
    return max(0, (card - weights) // per_token)


def _longest_cases():
    return [(24 * 10**9, 13_476_831_232, 6_000_384), (1000, 400, 7), (16 * 10**9, 10**11, 10**6), (100, 100, 3)]


EXERCISES = (
    Exercise("memory.sixteen", "easy", 5, "a number", number(
        51.2, tolerance=1e-6,
        near={38.4: "That is 12 bytes a parameter; in float32 the weight has 4, its gradient 4, AdamW's states 8.",
              25.6: "That is 8 bytes a parameter, as in pure bf16.",
              12.8: "Those are the weights alone."},
        hint="Four bytes a number: how many numbers are there for each parameter, weight, gradient and AdamW's states?",
        then="Activations come on top.")),
    Exercise("memory.stays", "easy", 5, '"gradients", "states" or "activations"', choice(
        "activations", options=("gradients", "states", "activations"),
        remarks={"gradients": "A frozen weight has no gradient.",
                 "states": "The optimiser has states of what it trains."},
        hint="What does the gradient pass through on its way to the lowest adapter?",
        then="The gradient passes through every frozen layer.")),
    Exercise("memory.logits", "medium", 10, "a number", number(
        3 * 4 * 2 * 4096 * 128_256 / 1e9, tolerance=1e-3,
        near={4 * 2 * 4096 * 128_256 / 1e9: "That is one copy; three are alive.",
              3 * 2 * 2 * 4096 * 128_256 / 1e9: "A float32 has four bytes, not two."},
        hint="Tokens times vocabulary times four bytes is one copy.",
        then="More than the weights of a small model.")),
    Exercise("memory.frozen", "medium", 15, "your function", function(
        _frozen, cases=_block_cases,
        near={"Per token it is right; multiply by the tokens.": lambda h, k, m, n, tokens: _frozen(h, k, m, n, 1),
              "That is the block with all weights trained.":
                  lambda h, k, m, n, tokens: tokens * (20 * h + 4 * k + 8 * m + 4 * n + 8),
              "down_proj has an input, too: the product of gate and up, 2 m.":
                  lambda h, k, m, n, tokens: tokens * (12 * h + 4 * k + 8 * m + 4 * n + 8),
              "Attention still needs its output, whatever o_proj needs.":
                  lambda h, k, m, n, tokens: tokens * (10 * h + 4 * k + 6 * m + 4 * n + 8)},
        hint="Ask of each row: is it there for the gradient of a weight, or for a gradient that passes through?",
        then="Less than a third falls away.")),
    Exercise("memory.longest", "hard", 15, "your function", function(
        _longest, cases=_longest_cases,
        near={"Where the weights alone are too large, the answer is 0, not a negative number.":
                  lambda card, weights, per_token: (card - weights) // per_token,
              "The weights take room, too.": lambda card, weights, per_token: card // per_token},
        hint="What the weights leave, divided by the bytes of a token, in whole tokens.",
        then="pl.memory.largest does this with everything else counted in.")),
)  # fmt: skip
