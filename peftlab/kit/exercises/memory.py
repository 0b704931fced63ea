"""Exercises of the chapter on memory."""

from peftlab.kit.exercises.grading import Exercise, choice, function, number


def _states(card, spare, bytes_each):
    """Return the number of parameters whose weight, gradient and states fit into a card."""
    return int((1 - spare) * card // bytes_each)


def _states_cases():
    return [(24 * 10**9, 0.0, 16), (80 * 10**9, 0.08, 8), (16 * 10**9, 0.25, 12)]


def _frozen(h, k, m, n, tokens):
    """Return 12 h + 4 k + 6 m + 4 n + 8 bytes per token: the block without the inputs that only weights need."""
    return tokens * (12 * h + 4 * k + 6 * m + 4 * n + 8)


def _block_cases():
    return [(4096, 4096, 11008, 32, 512), (2048, 512, 8192, 32, 7), (576, 192, 1536, 9, 1)]


def _crossing(N, V, h, a, layers):
    """Return the tokens at which activations and logits weigh as much as gradients and the optimiser's temporaries."""
    return (2 * N + 4 * V * h) / (a * layers + 12 * V)


def _crossing_cases():
    return [(6.7e9, 32000, 4096, 187536, 32), (1.2e9, 128256, 2048, 108680, 16), (1e6, 100, 10, 50, 3)]


def _longest(card, weights, per_token):
    return max(0, (card - weights) // per_token)


def _longest_cases():
    return [(24 * 10**9, 13_476_831_232, 6_000_384), (1000, 400, 7), (16 * 10**9, 10**11, 10**6), (100, 100, 3)]


EXERCISES = (
    Exercise("memory.sixteen", "easy", 5, "a number", number(
        51.2, tolerance=1e-6,
        near={38.4: "That is 12 bytes per parameter. In float32 the weight has 4, its gradient 4, AdamW's states 8.",
              25.6: "That is 8 bytes per parameter, as in pure bf16.",
              12.8: "Those are the weights alone.",
              51.2e9: "That is in bytes; a GB is a thousand million of them."},
        hint="Four bytes per number. How many numbers are there for each parameter: weight, gradient, AdamW's states?",
        then="Activations come on top.")),
    Exercise("memory.stays", "easy", 5, '"gradients", "states" or "activations"', choice(
        "activations", options=("gradients", "states", "activations"),
        remarks={"gradients": "A frozen weight has no gradient.",
                 "states": "The optimiser has states only for what it trains."},
        hint="What does the gradient pass through on its way to the lowest adapter?",
        then="The gradient passes through every frozen layer, and adapters keep inputs of their own.")),
    Exercise("memory.family", "easy", 5, '"reparameterised", "additive" or "selective"', choice(
        "reparameterised", options=("reparameterised", "additive", "selective"),
        remarks={"additive": "Training makes new tensors. But can they be folded into a weight that is there, so "
                             "that nothing is left over?",
                 "selective": "Selective methods train some of the weights that are there. Here the weight itself is "
                              "frozen."},
        hint="Is the result a new part of the network, a few old weights, or an old weight written in another form?",
        then="The update is another form of a change to a weight, so it can be merged.")),
    Exercise("memory.logits", "medium", 10, "a number", number(
        3 * 4 * 2 * 4096 * 128_256 / 1e9, tolerance=1e-3,
        near={4 * 2 * 4096 * 128_256 / 1e9: "That is one copy; three are alive at once.",
              3 * 2 * 2 * 4096 * 128_256 / 1e9: "A float32 has four bytes, not two.",
              3 * 4 * 4096 * 128_256 / 1e9: "The batch has two sequences."},
        hint="Tokens times vocabulary times four bytes is one copy.",
        then=f"That is {3 * 4 * 2 * 4096 * 128_256 / 1e9:.1f} GB, nearly as much as a 7B model's weights in 16 bits.")),
    Exercise("memory.copies", "medium", 10, "a number", number(
        8 * 4096 / 1e3, tolerance=1e-6,
        near={4 * 4096 / 1e3: "That is one copy. q and v each make their own from the same input.",
              (24 * 4096 + 4 * 11008) / 1e3: "That is for all seven projections.",
              16 * 4096 / 1e3: "That is for q, k, v and o."},
        hint="One float32 copy of a vector of width h takes 4 h bytes. How many projections make one?",
        then="So fewer adapted projections keep fewer copies.")),
    Exercise("memory.frozen", "hard", 15, "your function", function(
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
    Exercise("memory.crossing", "medium", 15, "your function", function(
        _crossing, cases=_crossing_cases,
        near={"The logits are missing below the line: 12 V bytes per token.":
                  lambda N, V, h, a, layers: (2 * N + 4 * V * h) / (a * layers),
              "The block's bytes count once for each layer.":
                  lambda N, V, h, a, layers: (2 * N + 4 * V * h) / (a + 12 * V),
              "The optimiser's two temporaries are missing above the line: 4 V h bytes.":
                  lambda N, V, h, a, layers: 2 * N / (a * layers + 12 * V),
              "One temporary takes 2 V h bytes in bf16, and there are two of them.":
                  lambda N, V, h, a, layers: (2 * N + 2 * V * h) / (a * layers + 12 * V)},
        hint="What is there in the optimiser but not at the loss? Divide it by what each token adds at the loss.",
        then="Above this number of tokens, the peak is at the start of the backward pass.")),
    Exercise("memory.margin", "easy", 5, "a number", number(
        1.03 * 22.5 + 0.7, tolerance=1e-3,
        near={22.5 + 0.7: "That covers the CUDA context. The estimate itself may be 3% too low.",
              1.03 * 22.5: "That covers the estimate's error. The CUDA context takes room as well.",
              0.97 * 22.5 + 0.7: "The estimate is too low, not too high: the margin is added.",
              22.5: "That leaves no margin at all."},
        hint="Add 3% of the estimate, and then the context.",
        then="A card of 24 GB just holds it, with little left for gaps.")),
    Exercise("memory.states", "medium", 10, "your function", function(
        _states, cases=_states_cases,
        near={"A share of the card is to stay free.": lambda card, spare, each: int(card // each),
              "You used the share that stays free. Use the rest of the card.":
                  lambda card, spare, each: int(spare * card // each)},
        hint="Usable bytes divided by the bytes of one parameter, in whole parameters.",
        then="Activations still need room, so a real model must be smaller.")),
    Exercise("memory.longest", "medium", 10, "your function", function(
        _longest, cases=_longest_cases,
        near={"Where the weights alone are too large, the answer is 0, not a negative number.":
                  lambda card, weights, per_token: (card - weights) // per_token,
              "The weights take room, too.": lambda card, weights, per_token: card // per_token},
        hint="What the weights leave, divided by the bytes of a token, in whole tokens.",
        then="pl.memory.largest does this with everything else counted in.")),
)  # fmt: skip
