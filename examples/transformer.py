"""LAD on the residual stream of a small transformer for tokens, compared with natural training of the same network.

    python examples/transformer.py            # under a minute on one core, no download

The task: does the first token of a sequence occur again? The network is an embedding, two encoder layers and a readout
of the first position, all from torch.nn. Tokens are not pixels, so the attack moves the embeddings by one signed step
along the gradient of the loss. The printed robust accuracy is measured on these embeddings. The numbers come from one
seed: they show how to use LAD here, not that it helps.
"""

import torch
from torch import Tensor, nn

from odeadv import models
from odeadv.training import Layerwise, Undefended

WORDS, LENGTH, WIDTH = 16, 10, 32
STEPS, BATCH, EPS, ETA = 250, 64, 0.1, 20.0


class Embed(nn.Module):
    """Token embeddings plus position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.places


class First(nn.Module):
    """Logits of the state at the first position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x[:, 0]))


def make_batch(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(WORDS, (n, LENGTH), generator=generator)
    return tokens, (tokens[:, 1:] == tokens[:, :1]).any(dim=1).long()


def make_network() -> models.BlockNetwork:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in "12"]
    return models.from_blocks(Embed(), layers, First())


def accuracies(net: models.BlockNetwork, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the accuracy on tokens, and the accuracy after one signed step of size EPS that raises the loss."""
    x = net.stem(tokens).detach().requires_grad_()
    values = []
    for _ in range(2):
        state = x
        for block in net.blocks:
            state = block(state)
        logits = net.head(state)
        values.append((logits.argmax(1) == labels).float().mean().item())
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), x)
        x = (x + EPS * gradient.sign()).detach().requires_grad_()
    return values[0], values[1]


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for such small tensors
    test = make_batch(torch.Generator().manual_seed(1), 1000)
    print("training    clean  robust")
    for name, defence in (("natural", Undefended()), ("LAD", Layerwise("lie", eta=ETA))):
        net, draw = make_network(), torch.Generator().manual_seed(2)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for _ in range(STEPS):
            passed = defence(net, *make_batch(draw, BATCH))
            optimizer.zero_grad()
            passed.loss.backward()
            optimizer.step()
        clean, robust = accuracies(net.eval(), *test)
        print(f"{name:<10} {100 * clean:6.1f}  {100 * robust:6.1f}")
