"""Networks from other packages as fields: bit for bit the same network, Eq. 5 and Eq. 8 by plain loops."""

import contextlib
import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import odeadv
from odeadv import models
from odeadv.fields import Jump, Operator, Piecewise, Residual
from odeadv.training import Undefended

torchvision = pytest.importorskip("torchvision")
ETA = 5.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resnet18() -> tuple[nn.Module, nn.Module, list[nn.Module], nn.Module]:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    blocks = [block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer]
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return net, stem, blocks, nn.Sequential(net.avgpool, nn.Flatten(), net.fc)


def mlp(training: bool = False) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """Return a network on vectors with dropout and batch norm; the third block changes the width."""
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    same = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2)]
    blocks = [*same, nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))]
    head = nn.Linear(6, 3)
    for part in (stem, *blocks, head):
        part.double().train(training)
    return stem, blocks, head


def by_hand(stem, blocks, head, inputs, loss, eta: float, *, strang: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eq. 5 or Eq. 8 with the rule for blocks that change the shape; dropout draws the same masks in both passes."""
    torch.manual_seed(seed)
    x = start = stem(inputs)
    random = torch.get_rng_state()
    held = copy.deepcopy([module.state_dict() for module in (*blocks, head)])
    states = [start.detach().requires_grad_()]
    for block in blocks:
        states.append(block(states[-1]))
    a = torch.autograd.grad(loss(head(states[-1])), states)
    torch.set_rng_state(random)
    for module, state in zip((*blocks, head), held, strict=True):
        module.load_state_dict(state)
    for n, block in enumerate(blocks):
        same = a[n].shape == a[n + 1].shape
        if strang:
            x = block(x + eta / 2 * a[n])
            x = x + (eta / 4 * (a[n] + a[n + 1]) if same else eta / 2 * a[n + 1])
        else:
            x = block(x) + eta * a[n + 1]
    output = head(x)
    return output, loss(output)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scheme", ["lie", "strang"])
def test_a_foreign_resnet_is_eq_5_and_eq_8(scheme, training):
    net, stem, blocks, head = resnet18()
    net.train(training)
    images, labels = torch.rand(4, 3, 32, 32, generator=generator()), torch.arange(4)
    twin = copy.deepcopy((stem, blocks, head))
    loss = functools.partial(F.cross_entropy, target=labels)
    output, value = by_hand(*twin, images, loss, ETA, strang=scheme == "strang")
    wrapped = models.from_blocks(stem, blocks, head)
    before = copy.deepcopy(net.state_dict())
    shown = wrapped(images)
    assert torch.equal(copy.deepcopy(wrapped)(images), shown) or training
    net.load_state_dict(before)
    sol = odeadv.solve(wrapped.field(images, labels, eta=ETA), scheme=scheme)
    assert torch.allclose(sol.output, output, rtol=1e-4, atol=1e-5)
    assert torch.allclose(sol.loss, value, rtol=1e-5)
    for mine, theirs in zip((stem, *blocks, head), (twin[0], *twin[1], twin[2]), strict=True):
        for name, buffer in mine.named_buffers():  # the statistics have moved once, as by hand
            assert torch.allclose(buffer, dict(theirs.named_buffers())[name], rtol=1e-4, atol=1e-6), name
    sol.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("scheme", [*odeadv.schemes.names(), "euler"])
def test_eta_zero_is_bitwise_the_plain_network(scheme):
    """In floating point x + (block(x) - x) is not block(x), so a step of every scheme must return the block's value."""
    net, stem, blocks, head = resnet18()
    net.eval()
    images, labels = torch.rand(4, 3, 32, 32, generator=generator()), torch.arange(4)
    wrapped = models.from_blocks(stem, blocks, head)
    expected = net(images)
    assert torch.equal(wrapped(images), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", odeadv.AccuracyWarning)
        assert torch.equal(odeadv.solve(wrapped.field(images, labels, eta=0.0), scheme=scheme).output, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128])
def test_the_state_may_have_any_dtype(dtype):
    class Turn(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64, generator=generator(seed)).to(dtype) / 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + x @ self.weight

    class Energy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().square().float()

    blocks = [Turn(n) for n in range(3)]
    x = torch.randn(2, 5, dtype=torch.float64, generator=generator(9)).to(dtype)
    plain = functools.reduce(lambda y, block: block(y), blocks, x)
    wrapped = models.from_blocks(nn.Identity(), blocks, Energy(), loss=lambda energy, targets: energy.mean())
    zero = odeadv.solve(wrapped.field(x, None, eta=0.0), scheme="strang", save_at="steps")
    assert torch.equal(zero.xs[-1], plain)
    assert zero.xs[-1].dtype == dtype
    pushed = odeadv.solve(wrapped.field(x, None, eta=0.1), scheme="strang")
    assert pushed.loss > zero.loss


@pytest.mark.parametrize("strang", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_vectors_with_dropout_batch_norm_and_a_loss_of_ones_own(strang, training):
    """Regression: the recording draws the same dropout as the pass that is trained on."""
    stem, blocks, head = mlp(training)
    twin = copy.deepcopy((stem, blocks, head))
    inputs = torch.rand(6, 4, dtype=torch.float64, generator=generator())
    targets = torch.rand(6, 3, dtype=torch.float64, generator=generator(1))
    loss = functools.partial(F.mse_loss, target=targets)
    output, value = by_hand(*twin, inputs, loss, ETA, strang=strang, seed=3)
    wrapped = models.from_blocks(stem, blocks, head, loss=F.mse_loss)
    torch.manual_seed(3)
    sol = odeadv.solve(wrapped.field(inputs, targets, eta=ETA), scheme="strang" if strang else "lie")
    assert torch.allclose(sol.output, output, rtol=1e-12)
    assert torch.allclose(sol.loss, value, rtol=1e-12)
    for mine, theirs in zip((stem, *blocks, head), (twin[0], *twin[1], twin[2]), strict=True):
        for name, buffer in mine.named_buffers():
            assert torch.allclose(buffer, dict(theirs.named_buffers())[name], rtol=1e-12), name


def test_jumps_are_found_by_running_and_never_by_names():
    """The same block is a step on one input and a jump on another: pooling changes nothing of a 1 x 1 image."""
    blocks = [nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1)]
    net = models.from_blocks(nn.Identity(), blocks, nn.Flatten())
    labels = torch.tensor([0, 1])
    large, small = (net.field(torch.rand(2, 3, side, side), labels) for side in (4, 1))
    assert [isinstance(piece, Jump) for piece in large.f.pieces] == [False, True, False]
    assert [isinstance(piece, Jump) for piece in small.f.pieces] == [False, False, False]


def test_looking_for_jumps_leaves_no_trace_and_is_done_once():
    stem, blocks, head = mlp(training=True)
    net = models.from_blocks(stem, blocks, head)
    calls = []
    blocks[0].register_forward_hook(lambda *_: calls.append(1))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    inputs = torch.rand(6, 4, dtype=torch.float64)
    torch.set_rng_state(random)
    net.field(inputs, torch.arange(6) % 3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(calls) == 1
    net.field(inputs[:4], torch.arange(4) % 3)  # another batch size: the layout is known
    assert len(calls) == 1


def test_a_jump_that_keeps_the_shape_warns_if_a_costate_acts():
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]

    def field(pieces: list, eta: float) -> odeadv.AdversarialField:
        return odeadv.AdversarialField(
            Piecewise(pieces, range(4)), lambda x: x.square().sum(), eta, x0=torch.rand(2, 4), t_span=(0.0, 3.0), dt=1.0
        )

    with pytest.warns(UserWarning, match=r"^Jump: got a map that keeps the state's shape, \(2, 4\)"):
        odeadv.solve(field([Jump(block) for block in blocks], 0.1), scheme="strang")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeadv.solve(field([Jump(block) for block in blocks], 0.0), scheme="strang")
        steps = [Operator(lambda t, x, block=block: block(x) - x) for block in blocks]
        odeadv.solve(field(steps, 0.1), scheme="strang")


class Tokens(nn.Module):
    """Token and position embeddings."""

    def __init__(self, words: int, width: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.places[: tokens.shape[1]]


class Last(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x[:, -1])


def transformer(masked: bool = True) -> models.BlockNetwork:
    torch.manual_seed(0)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True) for _ in range(2)]
    blocks = [models.bind(layer, src_mask=mask) for layer in layers] if masked else layers
    return models.from_blocks(Tokens(5, 16, 6), blocks, Last(16, 2))


def test_a_transformer_on_tokens_trains_with_lad_on_its_residual_stream():
    net = transformer()
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    draw = generator(1)
    losses, rises = [], []
    for _ in range(40):
        tokens = torch.randint(0, 5, (32, 6), generator=draw)
        labels = (tokens[:, -1] == tokens[:, -2]).long()
        sol = odeadv.solve(net.field(tokens, labels, eta=5.0), scheme="strang")
        optimiser.zero_grad()
        sol.loss.backward()
        optimiser.step()
        losses.append(float(sol.loss.detach()))
        net.eval()
        with torch.no_grad():
            plain = F.cross_entropy(net(tokens), labels)
            rises.append(float(odeadv.solve(net.field(tokens, labels, eta=5.0), scheme="strang").loss - plain))
        net.train()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert min(rises) > 0.0
    assert sol.costate(1.0).shape == (32, 6, 16)


def test_bound_masks_are_used_and_move_with_the_network():
    masked, free = transformer(), transformer(masked=False)
    masked.eval()
    free.eval()
    tokens = torch.randint(0, 5, (3, 6), generator=generator())
    assert not torch.allclose(masked(tokens), free(tokens))
    assert torch.equal(
        odeadv.solve(masked.field(tokens, torch.tensor([0, 1, 1])), scheme="strang").output, masked(tokens)
    )
    assert "src_mask" in dict(masked.blocks[0].named_buffers())
    assert masked.double().blocks[0].src_mask.dtype == torch.float64
    assert set(masked.state_dict()) == {
        name.replace("blocks.0.", "blocks.0.module.").replace("blocks.1.", "blocks.1.module.")
        for name in free.state_dict()
    }  # the mask is not a weight
    with pytest.raises(TypeError, match=r"^module: got function, expected a torch.nn.Module"):
        models.bind(lambda x: x)


def test_soft_labels_and_other_losses():
    stem, blocks, head = mlp()
    net = models.from_blocks(stem, blocks, head)
    inputs, labels = torch.rand(6, 4, dtype=torch.float64), torch.arange(6) % 3
    soft = F.one_hot(labels, 3).double()
    hard, same = (odeadv.solve(net.field(inputs, y, eta=1.0)).loss for y in (labels, soft))
    assert torch.allclose(hard, same)
    smoothed = models.from_blocks(stem, blocks, head, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    expected = F.cross_entropy(net(inputs), labels, label_smoothing=0.1)
    assert torch.allclose(odeadv.solve(smoothed.field(inputs, labels)).loss, expected)
    one = odeadv.solve(net.field(inputs, None, loss=lambda logits: logits.sum())).loss
    assert torch.allclose(one, net(inputs).sum())


def test_a_finer_solve_and_the_diagnostics_know_wrapped_networks():
    stem, blocks, head = mlp()
    net = models.from_blocks(stem, blocks, head)
    inputs, labels = torch.rand(6, 4, dtype=torch.float64), torch.arange(6) % 3
    fine = models.refine(net, 2)
    x = stem(inputs)
    for block in blocks:
        if block is blocks[2]:
            x = block(x)
            continue
        for _ in range(2):
            x = x + 0.5 * (block(x) - x)
    assert torch.allclose(fine(inputs), head(x), rtol=1e-12)
    found = odeadv.diagnostics.perturbation(net.field(inputs, labels, eta=1.0))
    assert len(found.ratios) == 4


def test_what_does_not_fit_is_named():
    stem, blocks, head = mlp()
    inputs, labels = torch.rand(6, 4, dtype=torch.float64), torch.arange(6) % 3
    with pytest.raises(ValueError, match=r"^blocks: got none, expected at least one"):
        models.from_blocks(stem, [], head)
    with pytest.raises(TypeError, match=r"^blocks\[0\]: got int, expected a torch.nn.Module"):
        models.from_blocks(stem, [3], head)
    with pytest.raises(TypeError, match=r"^stem: got function, expected a torch.nn.Module"):
        models.from_blocks(lambda x: x, blocks, head)
    with pytest.raises(TypeError, match=r"^loss: got float, expected a callable"):
        models.from_blocks(stem, blocks, head, loss=1.0)
    net = models.from_blocks(stem, blocks, head)
    with pytest.raises(TypeError, match=r"^labels: got torch.float64, expected int64 class numbers"):
        net.field(inputs, labels.double())
    with pytest.raises(ValueError, match=r"^labels: got classes 0 to 5, expected 0 to 2"):
        net.field(inputs, torch.arange(6))
    pair = models.from_blocks(stem, [nn.LSTM(8, 8).double()], head)
    with pytest.raises(TypeError, match=r"^blocks: block 0 \(LSTM\) returned tuple, expected a tensor"):
        pair.field(inputs, labels)
    whole = models.from_blocks(nn.Identity(), [nn.Embedding(3, 4)], head)
    with pytest.raises(TypeError, match=r"^stem: returned torch.int64, expected a floating or complex state"):
        whole.field(labels, labels)
    centred = inputs - 0.5
    written = models.from_blocks(
        nn.Identity(), [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4).double())], nn.Linear(4, 3).double()
    )
    with pytest.raises(ValueError, match=r"^block 0 \(Sequential\): modifies the state in place"):
        written.field(centred, labels)
    assert torch.equal(centred, inputs - 0.5)


def test_the_example_trains_a_transformer_on_its_residual_stream(capsys):
    """A few steps of the example, which prints one row per way of training."""
    path = Path(__file__).parents[1] / "examples" / "transformer.py"
    program = path.read_text(encoding="utf-8").replace("STEPS, BATCH, EPS, ETA = 250", "STEPS, BATCH, EPS, ETA = 3")
    exec(compile(program, path, "exec"), {"__name__": "__main__"})
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["training", "natural", "LAD"]
    assert rows[1].split()[1:] != rows[2].split()[1:]


def test_a_pass_costs_no_more_than_it_must():
    """Each block runs once in a plain solve, and twice in LAD: in the recording and in the perturbed pass."""
    _, stem, blocks, head = resnet18()
    wrapped = models.from_blocks(stem, blocks, head)
    images, labels = torch.rand(2, 3, 32, 32), torch.arange(2)
    wrapped.field(images, labels)  # finds the jumps
    calls = []
    for block in blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    for eta, expected in ((0.0, 8), (1.0, 16)):
        calls.clear()
        sol = odeadv.solve(wrapped.field(images, labels, eta=eta), scheme="strang")
        sol.loss.backward()
        assert len(calls) == expected
        assert sol.stats.evaluations["f"] == expected


class Operations(TorchDispatchMode):
    """Counts operations, and the bytes of their results."""

    count = size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.detach.default:
            self.count += 1
            self.size += result.numel() * result.element_size() if isinstance(result, Tensor) else 0
        return result


@pytest.mark.parametrize("blocks", [3, 6])
def test_wrapping_adds_few_operations_and_no_pass_over_every_state(blocks):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(blocks)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *layers, nn.Flatten(), nn.Linear(4 * 36, 5))
    wrapped = models.from_module(net, [str(n + 1) for n in range(blocks)])
    images, labels = torch.rand(8, 3, 8, 8, generator=generator()), torch.arange(8) % 5

    def step(loss) -> Operations:
        for counted in (Operations(), Operations()):  # the first step looks for jumps
            with counted:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    value = loss()
                value.backward()
        return counted

    plain = step(lambda: F.cross_entropy(net(images).float(), labels))
    solved = step(lambda: Undefended()(wrapped, images, labels).loss)
    # Checks of the labels, of the first state, of the result, and of one block in turn, which may write to its state.
    assert solved.count - plain.count <= 28
    # Copies: one for each of the checks, both saved states in one tensor, and two for the check of that tensor.
    state = 2 * 8 * 4 * 6 * 6  # bytes in bfloat16
    assert solved.size - plain.size <= 6 * state + 100


def test_inputs_may_be_a_structure_of_tensors():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, parts: dict[str, Tensor]) -> Tensor:
            return self.linear(parts["a"] + parts["b"])

    torch.manual_seed(0)
    net = models.from_blocks(Added(), [nn.Linear(6, 6)], nn.Linear(6, 3))
    inputs = {"a": torch.rand(5, 4), "b": torch.rand(5, 4)}
    labels = torch.arange(5) % 3
    sol = odeadv.solve(net.field(inputs, labels, eta=0.0), scheme="lie")
    assert torch.equal(sol.output, net(inputs))
    with pytest.raises(ValueError, match=r"^labels: got shape \(4,\), expected \(5,\)"):
        net.field(inputs, labels[:4])


def test_a_loss_in_inference_mode_with_labels_made_there():
    stem, blocks, head = mlp()
    net = models.from_blocks(stem, blocks, head)
    expected = None
    for context in (contextlib.nullcontext, torch.inference_mode):
        with context():
            inputs = torch.linspace(0, 1, 24, dtype=torch.float64).view(6, 4)
            loss = odeadv.solve(net.field(inputs, torch.arange(6) % 3, eta=1.0), scheme="strang").loss
        expected = loss if expected is None else expected
        assert torch.equal(loss, expected)


def test_autocast_runs_both_passes():
    net, stem, blocks, head = resnet18()
    wrapped = models.from_blocks(stem, blocks, head)
    images, labels = torch.rand(2, 3, 32, 32), torch.arange(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = odeadv.solve(wrapped.field(images, labels, eta=1.0), scheme="strang")
    sol.loss.backward()
    assert sol.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_masks_that_depend_on_the_inputs():
    """Padding after the end of a sentence changes nothing, neither in blocks nor in a head that averages."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            kept = (~padding).unsqueeze(-1).to(x)
            return self.out((x * kept).sum(1) / kept.sum(1))

    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]

    def padded(tokens: Tensor) -> Tensor:
        return tokens == 0

    blocks = [models.bind(layer, src_key_padding_mask=padded) for layer in layers]
    net = models.from_blocks(nn.Embedding(9, 8), blocks, models.bind(Mean(), padding=padded))
    short, labels = torch.randint(1, 9, (4, 5), generator=generator()), torch.arange(4) % 3
    long = F.pad(short, (0, 3))
    one, two = (odeadv.solve(net.field(x, labels, eta=2.0), scheme="strang") for x in (short, long))
    assert torch.allclose(one.output, two.output, atol=1e-5)
    assert torch.allclose(net(short), net(long), atol=1e-5)
    assert not torch.allclose(one.output, net(short), atol=1e-3)
    assert torch.equal(odeadv.solve(net.field(long, labels), scheme="lie").output, net(long))
    one.loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(TypeError, match=r"^bind: got a function of the network's inputs"):
        blocks[0](torch.rand(4, 5, 8))


def test_bound_arguments_by_position():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: Tensor, power: int) -> Tensor:
            return x + 0.1 * (factor * x) ** power

    block = models.bind(Scaled(), torch.tensor([1.0, 2.0]), 2)
    x = torch.rand(3, 2)
    assert torch.equal(block(x), Scaled()(x, torch.tensor([1.0, 2.0]), 2))
    assert dict(block.named_buffers()).keys() == {"argument1"}
    net = models.from_blocks(nn.Identity(), [block], nn.Linear(2, 2))
    assert torch.equal(odeadv.solve(net.field(x, torch.tensor([0, 1, 1])), scheme="lie").output, net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_residual_block_as_a_field_of_its_own(dtype):
    """One step of length 1 is the block, also for 16-bit states, which the solver keeps in float32."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).to(dtype)
    x = torch.rand(4, 6).to(dtype)
    end = odeadv.solve(Residual(block), x, (0.0, 3.0), steps=3).xs[-1]
    assert end.dtype == dtype
    assert torch.equal(end, block(block(block(x))))
    half = odeadv.solve(Residual(block), x, (0.0, 1.0), steps=2, save_at="steps").xs[1]
    assert torch.allclose(half.float(), (x + 0.5 * (block(x) - x)).float(), atol=0.02)
    with pytest.raises(TypeError, match=r"^block: got int, expected a callable block"):
        Residual(3)


def test_a_block_that_writes_through_numpy_is_refused():
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.detach().numpy()[:] = 0.0
            return x + 1.0

    with pytest.raises(ValueError, match=r"^own: modifies the state in place"):
        odeadv.solve(Residual(Hidden(), name="own"), torch.ones(2, 3), (0.0, 1.0), steps=1)
