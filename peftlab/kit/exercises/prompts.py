"""Exercises of the chapter on prompts and prefixes."""

from peftlab.kit.exercises.grading import Exercise, choice, function, number

# llama-3.1-8b: layers, key/value width (8 heads of 128), hidden width; llama-2-7b: key/value width
LAYERS, KEY_VALUE, HIDDEN = 32, 1024, 4096


def _prefix(n, k=KEY_VALUE, layers=LAYERS):
    """Count a key and a value for each virtual token and layer."""
    return n * 2 * layers * k


def _projection(n, k, h, layers):
    """Count n rows of width k, then Linear(k, h) and Linear(h, 2 L k), with biases."""
    return n * k + (k * h + h) + (h * 2 * layers * k + 2 * layers * k)


def _projection_cases():
    return [(20, 768, 768, 12), (30, 192, 512, 30), (7, 5, 3, 2)]


def _gate(q, P, K):
    """Return the share of softmax(q [P; K]^T / sqrt(w)) that falls on P."""
    import torch

    scores = torch.cat([P, K]) @ q / q.shape[-1] ** 0.5
    return scores.softmax(0)[: len(P)].sum()


def _gate_cases():
    import torch

    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return [(draw(w), draw(n, w), draw(t, w)) for n, t, w in [(3, 5, 4), (20, 7, 8), (1, 1, 2)]]


def _unscaled(q, P, K):
    import torch

    return (torch.cat([P, K]) @ q).softmax(0)[: len(P)].sum()


def _apart(q, P, K):
    scale = q.shape[-1] ** 0.5
    one, other = (P @ q / scale).exp().mean(), (K @ q / scale).exp().mean()
    return one / (one + other)


def _longer(labels, n):
    """Put n labels of -100 in front of each row."""
    import torch

    return torch.cat([labels.new_full((len(labels), n), -100), labels], dim=1)


def _filled(labels, n, fill):
    labels = _longer(labels, n)
    labels[:, :n] = fill
    return labels


def _labels_cases():
    import torch

    return [(torch.tensor([[-100, 5, 7], [3, 4, -100]]), 2), (torch.tensor([[9]]), 4)]


def _first(n, lengths):
    """Return the position of each row's first word: after the virtual tokens and after the padding on the left."""
    return [n + max(lengths) - length for length in lengths]


EXERCISES = (
    Exercise("prompts.prefix", "easy", 5, "a whole number", number(
        _prefix(30),
        near={_prefix(30, HIDDEN): "Under grouped-query attention keys and values are narrower than the model: 8 heads "
                                   "of 128.",
              _prefix(30) // 2: "Attention needs a key to compare with and a value to return: two rows each.",
              _prefix(30, layers=1): "That is one layer. Every layer has keys and values of its own.",
              30 * HIDDEN: "That is a prompt, which stands at the input only; a prefix stands in each layer."},
        hint="For each virtual token a key and a value in each layer, each as wide as all key/value heads together.",
        then="0.02% of the model.")),
    Exercise("prompts.kept", "easy", 5, '"prompt", "prefix", "both" or "none"', choice(
        "none", options=("prompt", "prefix", "both", "none"),
        remarks={"prompt": "P-tuning's encoder is used while training; what it made is what is stored.",
                 "prefix": "The projection is used while training; what it made is what is stored.",
                 "both": "Look into the files: one tensor each, called prompt_embeddings."},
        hint="Which tensors are in the file?",
        then="What the network made is all that a trained model needs.")),
    Exercise("prompts.projection", "medium", 10, "your function", function(
        _projection, cases=_projection_cases,
        near={"The biases are missing: a linear layer has one for each output, here h and 2 L k.":
                  lambda n, k, h, layers: n * k + k * h + h * 2 * layers * k,
              "The n vectors that go in are trained, too: without them every virtual token would be the same.":
                  lambda n, k, h, layers: _projection(0, k, h, layers),
              "A layer needs a key and a value of width k, so the last layer has 2 L k outputs, not L k.":
                  lambda n, k, h, layers: n * k + (k * h + h) + (h * layers * k + layers * k),
              "The MLP is the same for every virtual token; only its inputs are n.":
                  lambda n, k, h, layers: n * _projection(1, k, h, layers)},
        hint="Three pieces: n vectors of width k; a linear layer k to h; a linear layer h to 2 L k. Both have biases.",
        then="Millions, whatever n is.")),
    Exercise("prompts.gate", "medium", 15, "your function", function(
        _gate, cases=_gate_cases,
        near={"The scores are divided by the square root of the head's width.": _unscaled,
              "That is the other side: the share that stays with the text.":
                  lambda q, P, K: 1 - _gate(q, P, K),
              "Take sums, not means: twenty keys have twenty chances.": _apart},
        hint="One softmax over all keys; add up what falls on the first n.",
        then="He et al. read prefix tuning as this gate.")),
    Exercise("prompts.cache", "medium", 10, "a number", number(
        100 * 2 * 32 * 4096 * 2 / 1e6, tolerance=1e-3,
        near={100 * 32 * 4096 * 2 / 1e6: "The cache keeps a key and a value for each position, not one of the two.",
              100 * 2 * 32 * 4096 * 4 / 1e6: "bf16 takes two bytes per number; four are float32.",
              100 * 2 * 4096 * 2 / 1e6: "That is one layer. Each layer reads keys and values of its own."},
        hint="For each virtual token a key and a value of 4096 numbers in each of 32 layers, two bytes each.",
        then="And as much again for each further request in the batch.")),
    Exercise("prompts.labels", "easy", 5, "your function", function(
        _longer, cases=_labels_cases,
        near={"0 is a token of the vocabulary: the loss would ask the model to predict it there. It skips -100.":
                  lambda labels, n: _filled(labels, n, 0),
              "The virtual tokens are in front of the text, so their labels are, too.":
                  lambda labels, n: _longer(labels, n).roll(-n, dims=1),
              "1 belongs into the attention mask. As a label it is a token to be predicted; the loss skips -100.":
                  lambda labels, n: _filled(labels, n, 1)},
        hint="n new columns in front of each row, filled with the label that PyTorch's loss skips.",
        then="The attention mask gets ones there: the text must see the prompt. But no virtual token is a word "
             "to be predicted, so none has a label.")),
    Exercise("prompts.angle", "medium", 10, "your function", function(
        lambda rate, d, length: rate * d**0.5 / length,
        cases=lambda: [(0.1, 576, 3.2), (0.3, 4096, 64.0), (1e-3, 16, 2.0)],
        near={"All d coordinates move. Try d = 4: the step (rate, rate, rate, rate) is 2 rate long, not rate.":
                  lambda rate, d, length: rate / length,
              "The length of a vector is the root of the sum of the squares: d of them give sqrt(d), not d.":
                  lambda rate, d, length: rate * d / length,
              "A longer vector turns less: divide by its length.":
                  lambda rate, d, length: rate * d**0.5 * length},
        hint="Adam moves each of d coordinates by the rate. How long is that step, beside the vector?",
        then="A standard normal vector has length sqrt(d), and turns by the rate itself.")),
    Exercise("prompts.reading", "medium", 5, "a number", number(
        1 + 100 / 400, tolerance=1e-3,
        near={100 / 400: "That is what is added. The text itself is still read.",
              1 + 100 / 500: "Divide by the text's tokens alone: 400 of them are the work without a prompt.",
              1.0: "That is a prefix, whose keys and values are there already. A prompt passes through every layer.",
              400 / 500: "The work grows: more positions pass through the layers."},
        hint="Each position, virtual or not, passes through every layer. Compare the numbers of positions.",
        then="If the server keeps the prompt's keys and values, the factor is nearly 1.")),
    Exercise("prompts.position", "medium", 10, "your function", function(
        lambda n, lengths: _tensor(_first(n, lengths)), cases=lambda: [(5, [3, 7, 4]), (20, [6]), (1, [1, 9])],
        near={"Padding counts, too: a short row begins further right.":
                  lambda n, lengths: _tensor([n for _ in lengths]),
              "The virtual tokens come before everything, padding too.":
                  lambda n, lengths: _tensor([max(lengths) - length for length in lengths])},
        hint="A row is n virtual tokens, then padding up to the longest text, then its own words. Count from 0. Return "
             "a tensor.",
        then="That is why a batch padded on the left may answer differently from its rows alone.")),
)  # fmt: skip


def _tensor(values):
    import torch

    return torch.tensor(values)
