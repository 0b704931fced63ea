"""Each method's layer: what Hugging Face peft's forward passes allocate around the frozen layer.

Each function takes the model, a path, and the method's tensors there by name. It puts the method into the model: around
a layer (`net.layers`), around a feed-forward (`net.around_feed_forward`), or in front of the first block (`net.front`).
The method's row in the catalogue names its function. As in peft, adapters are float32 by default, also on a 16-bit
base. A call then casts its input, and at the end casts its output back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peftlab.errors import PeftLabError
from peftlab.memory.counting.shapes import Shape
from peftlab.memory.replay import ops, products, views
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Tensor, checkpoint

Call = Callable[[Tensor], Tensor]
Own = dict[str, Any]  # parameters; and tensors that do not train


def lora(net: Net, path: str, own: Own) -> None:
    """Replay y + B(A x) s: peft's `lora.Linear`, or its 4-bit layer, which clones y and casts the update.

    peftlab's layer does neither. And under autocast peft first makes a float32 copy of the input, which peftlab does
    not. A start from the weight is a second pair of products, (B(A x) - B0(A0 x)) s, which keep nothing.
    """
    if net.modules[path].kind == "embedding":
        _embedding_lora(net, path, own)
        return
    if net.modules[path].kind in ("experts", "router"):
        _parameter_lora(net, path, own)
        return
    ours = net.recipe.library == "peftlab"
    quantised = path in net.quantised and not ours

    def call(x: Tensor) -> Tensor:
        result = net.plain(path, x)
        bytes = result.bytes
        if quantised:
            result = ops.copy(result)
        if not (net.autocast and (quantised or ours)):
            x = ops.cast(x, own["lora_A"].bytes)
        update = net.product(net.product(x, own["lora_A"]), own["lora_B"])
        if "start_A" in own:
            start = net.frozen_product(net.frozen_product(x, own["start_A"].shape[0]), own["start_B"].shape[0])
            update = ops.subtract_in_place(update, start)
            del start
        update = ops.scale(update)
        if quantised and not net.autocast:
            update = ops.cast(update, bytes)
        result = ops.add(result, update)
        del update
        return result if quantised else ops.cast(result, bytes)

    net.layers[path] = call


def _embedding_lora(net: Net, path: str, own: Own) -> None:
    """Replay W[i] + A^T[i] B^T s for token i."""

    def call(ids: Tensor) -> Tensor:
        result = products.embedding(ids, net.weights[path])
        bytes = result.bytes
        chosen = products.embedding_rows(ids, own["lora_embedding_A"])
        return ops.cast(ops.add(result, ops.scale(net.product(chosen, own["lora_embedding_B"]))), bytes)

    net.layers[path] = call


def _parameter_lora(net: Net, path: str, own: Own) -> None:
    """Replay W + s B A in the place of a parameter: peft's `ParamWrapper`, or peftlab's `LoRAParameter`.

    The sum is as large as all experts together. It lives until the experts have run. `mixtures.weight_of` says how it
    comes to the backward pass.
    """

    def folded(weight: Tensor) -> Tensor:
        return products.folded(weight, ops.cast(own["lora_A"], weight.bytes), ops.cast(own["lora_B"], weight.bytes))

    def router(x: Tensor) -> Tensor:
        weight = net.weights[path]
        update = ops.scale(products.outer(own["lora_A"], own["lora_B"], weight.shape))
        whole = ops.add(weight, ops.cast(update, weight.bytes))
        return net.product(x, whole, net.biases.get(path))

    if net.modules[path].kind == "experts":
        net.parameters_with_more[path] = folded
    else:
        net.layers[path] = router


def dora(net: Net, path: str, own: Own) -> None:
    """Replay (m/n - 1) W x + (m/n) B(A x) s. Each forward pass computes n, the norms of W + s B A.

    For n, peft multiplies B A by an identity matrix of d_in x d_in and casts W to the adapter's dtype. The backward
    pass keeps none of this.
    """
    if net.modules[path].kind == "embedding":
        raise PeftLabError(f"DoRA on the embedding {path} is not replayed; name linear layers, or use lora.")
    if net.recipe.library == "peftlab":
        _our_dora(net, path, own)
        return
    if path in net.quantised:
        raise PeftLabError(
            "peft's DoRA on a base in four bits is not replayed. peftlab's is: library='peftlab' (--library peftlab)."
        )
    weight = net.weights[path]
    outputs, inputs = own["lora_B"].shape[0], own["lora_A"].shape[1]

    def norms(x: Tensor) -> tuple:
        bytes = x.bytes
        with net.memory.graph(False):
            eye = x.new((inputs, inputs), own["lora_A"].bytes)
            kept = net.half(eye) if net.autocast else eye  # the graph of B A holds the identity as it is multiplied
            product = net.product(net.product(kept, own["lora_A"]), own["lora_B"])
            del eye
            product = ops.cast(product, bytes)
            whole = ops.cast(weight.detach().view(outputs, inputs), bytes)
            scaled = ops.scale(product)
            summed = ops.add(whole, scaled)
            del scaled
            return whole, product, summed.new((outputs,)), kept

    def call(x: Tensor) -> Tensor:
        result = net.plain(path, x)
        bytes = result.bytes
        x = ops.cast(x, own["lora_A"].bytes)
        held = norms(x)  # peft's forward holds the copies until it returns
        ratio = ops.divide(own["lora_magnitude_vector"], held[2])
        update = net.product(net.product(x, own["lora_A"]), own["lora_B"])
        base = result
        if path in net.biases:
            base = ops.copy(result, max(result.bytes, net.biases[path].bytes))
        first = ops.mul(base, ops.shift(ratio))
        second = ops.scale(ops.mul(update, ratio))
        total = ops.add(first, second)
        del first, second, update, base, held
        result = ops.add(result, total)
        del total
        return ops.cast(result, bytes)

    net.layers[path] = call


def _our_dora(net: Net, path: str, own: Own) -> None:
    """Replay peftlab's layer, which needs no identity and no copies of inputs under autocast.

    Its norms take two tensors of the size of W in the dtype of the adapter, for a moment: W (decoded or cast, if it is
    not in that dtype already), and B A, which is scaled and added to in place.
    """
    size = net.weight_size(path)
    wide = own["lora_A"].bytes

    def norms(x: Tensor) -> Tensor:
        with net.memory.graph(False):
            whole = x.new(size, wide) if path in net.quantised else ops.cast(net.weights[path].detach(), wide)
            product = ops.cast(net.outer(own["lora_B"], own["lora_A"]), wide)
            del whole
            return product.new((size[0],))

    def call(x: Tensor) -> Tensor:
        result = net.plain(path, x)
        bytes = result.bytes
        if not net.autocast:
            x = ops.cast(x, wide)
        bias = net.own_bias(path)
        base = ops.copy(result, max(result.bytes, bias.bytes)) if bias is not None else result
        ratio = ops.divide(own["lora_magnitude_vector"], norms(x))
        update = ops.scale(ops.mul(net.product(net.product(x, own["lora_A"]), own["lora_B"]), ratio))
        total = ops.add(ops.mul(base, ops.shift(ratio)), update)
        result = ops.add(result, total)
        del total
        return ops.cast(result, bytes)  # until now our function holds the update and W x

    net.layers[path] = call


def adalora(net: Net, path: str, own: Own) -> None:
    """Replay y += x (A * E)^T B^T s / rank, where the sum is in place.

    In peft the rank numbers get a gradient once they have been moved to another device or dtype than CPU and float32.
    In peftlab they never do, so the update need not be kept; the sum is a new tensor. Its training keeps two averages
    of each parameter. (peft keeps three, from the first call of `update_and_allocate` on, which are not counted.)
    """
    ours = net.recipe.library == "peftlab"
    trained = [own[name] for name in ("lora_A", "lora_B", "lora_E")] * 2 if ours else []
    averages = [Tensor(net.memory, one.shape, one.bytes, "optimizer") for one in trained]

    def call(x: Tensor, averages: list[Tensor] = averages) -> Tensor:
        result = net.plain(path, x)
        bytes = result.bytes
        if not (net.autocast and ours):
            x = ops.cast(x, own["lora_A"].bytes)
        scaled = ops.mul_rows(own["lora_A"], own["lora_E"])
        if ours:
            update = ops.scale(net.product(net.product(x, scaled), own["lora_B"]))
            del scaled
            update = ops.scale(update)  # divided by the rank
            result = ops.add(result, update)
            del update
            return ops.cast(result, bytes)
        rank = ops.shift(own["ranknum"])
        return ops.add_in_place(
            result, ops.divide_by_trained(ops.scale(net.product(net.product(x, scaled), own["lora_B"])), rank)
        )

    net.layers[path] = call


def vera(net: Net, path: str, own: Own) -> None:
    """Replay y + b * B(d * A x). A and B are frozen and shared, so only the scalings by d and b keep a tensor.

    Under autocast peft makes a float32 copy of the input first, and its result has that dtype; peftlab does neither.
    """
    ours = net.recipe.library == "peftlab"

    def call(x: Tensor) -> Tensor:
        before = x.bytes
        result = net.plain(path, x)
        bytes = result.bytes
        if not (net.autocast and ours):
            x = ops.cast(x, own["vera_lambda_d"].bytes)
        outputs, r = own["vera_lambda_b"].shape[0], own["vera_lambda_d"].shape[0]
        inner = ops.mul(net.frozen_product(x, r), own["vera_lambda_d"])
        update = ops.mul(net.frozen_product(inner, outputs), own["vera_lambda_b"])
        del inner
        result = ops.add(result, update)
        del update
        result = ops.cast(result, bytes)
        return result if ours else ops.cast(result, before)

    net.layers[path] = call


def loha(net: Net, path: str, own: Own) -> None:
    """Replay y + dW x, where dW is the product, entry by entry, of two products of thin matrices."""
    factors = [own[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab"]

    def delta() -> Tensor:
        a1, b1, a2, b2 = factors
        if net.recipe.library != "peftlab":
            halves = [net.half(factor) for factor in factors] if net.autocast else factors
            return products.hadamard(a1, b1, a2, b2, halves[0].bytes)
        if net.autocast:
            a1, b1, a2, b2 = (ops.cast(factor, 2) for factor in factors)
        size = a1.shape[0], b1.shape[1]
        return ops.mul(products.outer(a1, b1, size), products.outer(a2, b2, size))

    _whole_update(net, path, delta)


def lokr(net: Net, path: str, own: Own) -> None:
    """Replay y + dW x, where dW is the Kronecker product of a small matrix and another one, or its two thin factors."""
    first = own["lokr_w1"]

    def delta() -> Tensor:
        if "lokr_w2" in own:
            second: Tensor = own["lokr_w2"]
        else:
            a, b = own["lokr_w2_a"], own["lokr_w2_b"]
            second = net.outer(a, b)
        size = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
        if net.recipe.library != "peftlab":
            return ops.scale(products.kronecker(first, second, size, by_blocks=False))
        small = ops.cast(first, second.bytes) if net.autocast else first
        return products.kronecker(small, ops.cast(second, small.bytes), size, by_blocks=True)

    _whole_update(net, path, delta)


def _whole_update(net: Net, path: str, delta: Callable[[], Tensor]) -> None:
    """Replay y + dW x. peft keeps dW for the backward pass; peftlab keeps the input and makes dW again.

    In peft the result has the dtype of the input, also under autocast.
    """
    ours = net.recipe.library == "peftlab"

    def product(x: Tensor) -> Tensor:
        with net.under_autocast():
            made = delta()
            if not ours:
                made.storage.mark("activations")
            return net.product(x if ours and net.autocast else ops.cast(x, made.bytes), made)

    def call(x: Tensor) -> Tensor:
        result = net.plain(path, x)
        bytes = result.bytes if ours else x.bytes
        update = checkpoint(product, [x], trains=True) if ours else product(x)
        result = ops.add_scaled(result, update) if ours else ops.add(result, update)
        del update
        return ops.cast(result, bytes)

    net.layers[path] = call


def oft(net: Net, path: str, own: Own) -> None:
    """Replay W (R x): rotations from Q, Q^2, Q^3 and Q^4, a product of each block with its piece of x, and a copy."""
    if net.modules[path].kind == "embedding":
        raise PeftLabError(f"OFT on the embedding {path} is not replayed; name linear layers, or use lora.")
    weight = own["oft_R"]
    count, elements = weight.shape
    n = round((1 + (1 + 8 * elements) ** 0.5) / 2)

    def call(x: Tensor) -> Tensor:
        bytes = x.bytes
        rotations = products.rotations(weight, (count, n, n), net.autocast)
        wide = ops.cast(x, weight.bytes)
        if net.autocast:
            wide, rotations = net.half(wide), net.half(rotations)
        rotated = ops.cast(ops.copy(products.turned(wide, rotations)), bytes)
        del wide, rotations
        result = net.plain(path, rotated)
        return result if net.recipe.library == "peftlab" else ops.cast(result, bytes)

    net.layers[path] = call


def ia3(net: Net, path: str, own: Own) -> None:
    """Replay l * (W x), or W (l * x) for a feed-forward layer. The product is in the dtype of l, then cast back."""
    scale = own["ia3_l"]

    def before(x: Tensor) -> Tensor:
        bytes = x.bytes
        return net.plain(path, ops.cast(ops.mul(ops.cast(x, scale.bytes), scale), bytes))

    def after(x: Tensor) -> Tensor:
        result = net.plain(path, x)
        return ops.cast(ops.mul(result, scale), result.bytes)

    net.layers[path] = before if scale.shape[0] == 1 else after


def bottleneck(net: Net, path: str, own: Own) -> None:
    """Replay y + up(relu(down y)): a bottleneck after the layer, or after a feed-forward with experts."""

    def behind(x: Tensor, function: Call) -> Tensor:
        result = function(x)
        return _through_bottleneck(net, own, result, result)

    if path in net.modules:
        net.layers[path] = lambda x: behind(x, partial(net.plain, path))
    else:
        net.around_feed_forward[path] = behind


def parallel(net: Net, path: str, own: Own) -> None:
    """Replay f(x) + up(relu(down x)): a bottleneck beside a feed-forward f, or beside the layer f that was named."""

    def call(x: Tensor) -> Tensor:
        return _through_bottleneck(net, own, x, net.plain(path, x))

    if net.named:
        net.layers[path] = call
    else:
        net.around_feed_forward[path] = lambda x, function: _through_bottleneck(net, own, x, function(x))


def _through_bottleneck(net: Net, own: Own, x: Tensor, result: Tensor) -> Tensor:
    """Compute result + up(relu(down x)) in the adapter's dtype."""
    bytes = result.bytes
    wide = ops.cast(x, own["down.weight"].bytes)
    inner = ops.from_result(net.product(wide, own["down.weight"], own["down.bias"]))
    update = net.product(inner, own["up.weight"], own["up.bias"])
    return ops.cast(ops.add(result, update), bytes)


def prompt(net: Net, path: str, own: Own) -> None:
    """Replay n learned vectors in front of each example's word embeddings. T5 has 2 n of them and uses the first n."""
    _in_front(net, own, lambda virtual: virtual)


def p_tuning(net: Net, path: str, own: Own) -> None:
    """Replay a prompt that a three-layer MLP computes from learned vectors, once for each example."""

    def encode(virtual: Tensor) -> Tensor:
        for i in (0, 2, 4):
            virtual = net.product(virtual, own[f"mlp_head.{i}.weight"], own[f"mlp_head.{i}.bias"])
            virtual = ops.from_result(virtual) if i < 4 else virtual  # relu
        return virtual

    _in_front(net, own, encode)


def _in_front(net: Net, own: Own, encode: Call) -> None:
    rows = own["embedding.weight"]
    count = rows.shape[0] // (2 if net.shape.kind == "encoder-decoder" else 1)

    def front(x: Tensor) -> Tensor:
        virtual = views.first_rows(encode(net.virtual(x, rows.shape[0], rows)), count)
        net.held.append(views.cat(ops.cast(virtual, x.bytes), x, 1))
        return net.held[-1]

    net.front = front


def prefix(net: Net, path: str, own: Own) -> None:
    """Replay keys and values of n virtual tokens for each block, from one table. Each block's cache is a copy."""
    if net.recipe.checkpointing:
        raise PeftLabError(
            "Prefix tuning in peft needs the cache of keys and values, which checkpointing switches off. peftlab's own "
            "prefix trains with checkpointing, but its memory is not known yet. Leave checkpointing off."
        )
    if net.shape.kind == "encoder-decoder" and not _prefix_runs(net.shape):
        raise PeftLabError(
            f"{net.shape.name}: peft's prefix has the encoder's depth and the model's width, but this decoder's are "
            "different, so peft cannot run it. Use another method."
        )
    rows = own["embedding.weight"]
    made = net.renewed

    def front(x: Tensor) -> Tensor:
        virtual = net.virtual(x, rows.shape[0], rows)
        if "transform.0.weight" in own:
            virtual = ops.from_result(net.product(virtual, own["transform.0.weight"], own["transform.0.bias"]))
            virtual = net.product(virtual, own["transform.2.weight"], own["transform.2.bias"])
        made[:] = [ops.cast(virtual, x.bytes)]
        return x

    def extend(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, groups, _, width = k.shape
        part = made[0].view(batch, groups, rows.shape[0], width)
        return views.cat(part, k, 2), views.cat(part, v, 2)

    net.front, net.extend = front, extend


def _prefix_runs(shape: Shape) -> bool:
    """Say whether T5's decoder is as deep as its encoder, and its attention as wide as the model."""
    blocks = [{m.layer for m in shape.modules if m.path.startswith(f"{kind}.block")} for kind in ("encoder", "decoder")]
    inner = next(m.outputs for m in shape.modules if m.path.endswith("SelfAttention.q"))
    return blocks[0] == blocks[1] and inner == shape.modules[0].outputs
