"""Mistakes of the first hour, and the messages that answer them."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import odeadv
from odeadv import attacks, cli, evaluate, models
from odeadv.data.checks import check_pixels
from odeadv.training import (
    EpochResult,
    Layerwise,
    Penalty,
    Pgd,
    TrainConfig,
    TrainingDiverged,
    TrainResult,
    Undefended,
    plot_curves,
    train,
)

X0 = torch.ones(2)


def decay(t, x):
    return -x


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "did you mean 'train'?"),
        (["table", "tabel1"], "did you mean 'table1'?"),
        (["train", "--method", "natural", "--set", "lr=0.1"], "did you mean 'training.lr'?"),
        (["train", "--method", "natural", "--set", "eta=3"], "did you mean 'training.defence.eta'?"),
        (["train", "--method", "natural", "--set", "training.nothing=3"], "nothing: is not a key of TrainConfig; keys"),
    ],
)
def test_commands_and_keys_have_a_near_match(arguments, told, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert told in capsys.readouterr().err


def test_operators_need_names():
    with pytest.raises(TypeError, match=r"^operators: got 2 without a name, expected names: SplitField\(diffusion=f"):
        odeadv.SplitField(decay, decay)


def test_a_word_for_the_step_size():
    with pytest.raises(TypeError, match=r"^dt: got 'auto', expected a number, or dt='adaptive' with rtol and atol"):
        odeadv.solve(decay, X0, (0.0, 1.0), dt="auto")


def test_arguments_in_the_wrong_order():
    with pytest.raises(TypeError, match=r"^f: takes \(x, t\), expected f\(t, x\): the state comes last"):
        odeadv.solve(lambda x, t: -x, X0, (0.0, 1.0), dt=0.1)
    with pytest.raises(TypeError, match=r"^f: takes \(x\), expected f\(t, x\)"):
        odeadv.solve(lambda x: -x, X0, (0.0, 1.0), dt=0.1)
    for flow, shown in ((lambda x, t, dt: x, r"x, t, dt"), (lambda dt, x: x, "dt, x")):
        with pytest.raises(TypeError, match=rf"^flow: takes \({shown}\), expected flow\(t, dt, x\)"):
            odeadv.Operator(decay, flow=flow)
    odeadv.Operator(lambda t, x, rate=2.0: -rate * x)  # a default is not a mistake
    odeadv.Operator(lambda *arguments: -arguments[1])


STAGE = odeadv.Stage
OF_OTHERS = odeadv.Scheme("mine", (STAGE("a", 1.0), STAGE("b", 1.0)), order=1, source="test")
LINEAR, IMAGES, LABELS = nn.Linear(2, 2), torch.rand(4, 2), torch.arange(4) % 2
WRAPPED, SUM = models.from_blocks(nn.Conv2d(3, 4, 3), [nn.Identity()], nn.Flatten()), nn.MSELoss(reduction="sum")
AVERAGED, PARALLEL = torch.optim.swa_utils.AveragedModel(WRAPPED), nn.DataParallel(WRAPPED)
PIXELS = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
PICTURES, ONE_HOT = torch.rand(4, 3, 8, 8), torch.nn.functional.one_hot(LABELS, 2)

MISTAKES = [
    (
        lambda: odeadv.solve(LINEAR, X0, (0.0, 1.0), steps=1),
        r"^f: takes \(input\), .* net\.field\(inputs, targets, eta\)",
    ),
    (lambda: odeadv.solve(lambda Y, t: -Y, X0, (0.0, 1.0), steps=1), r"^f: takes \(Y, t\), .*the state comes last"),
    (lambda: odeadv.solve(decay, X0, (0.0, 1.0)), r"^dt: neither .* or dt='adaptive'"),
    *(
        (
            lambda steps=steps: odeadv.solve(decay, X0, (0.0, 1.0), scheme="dopri5", **steps),
            rf"^dt: got {got} with 'torchdiffeq:dopri5', .* expected steps=1, .*TorchDiffEq\('dopri5', rtol=",
        )
        for steps, got in (({}, "no steps"), ({"dt": "adaptive", "rtol": 1e-6}, "'adaptive'"))
    ),
    (
        lambda: odeadv.solve(odeadv.SplitField(a=decay, b=decay), X0, (0.0, 1.0), scheme="dopri5", dt="adaptive"),
        "^dt: got 'adaptive' with 'torchdiffeq:dopri5'",
    ),
    (
        lambda: odeadv.solve(decay, X0, (0.0, 1.0), scheme="tsit5", steps=1),
        r"^scheme: got 'tsit5', expected one of lie, .* a sub-step: euler, .* torchdiffeq \(dopri8, ",
    ),
    (lambda: odeadv.solve(decay, X0, (0.0, 1.0), scheme="rk44", steps=1), r"^scheme: .*did you mean .*'rk4'"),
    (lambda: odeadv.solve(decay, X0.numpy(), (0.0, 1.0), steps=1), r"^x0: got ndarray.*torch\.as_tensor\(x0\)"),
    (lambda: odeadv.solve(decay, [1.0, 2.0], (0.0, 1.0), steps=1), r"^x0\[0\]: got float.*torch\.tensor\(x0\)"),
    (lambda: odeadv.solve(decay, X0, (0.0, 1.0), substep="rk44", steps=1), r"did you mean 'rk4' or 'sdirk4'\?$"),
    (lambda: odeadv.Scheme("mine", ((0, 1.0),), order=1, source="test"), r"^stages: got \(0, 1.0\) .*odeadv\.Stage\("),
    (
        lambda: odeadv.solve(odeadv.SplitField(u=decay, v=decay), X0, (0.0, 1.0), steps=1, scheme=OF_OTHERS),
        "^scheme: 'mine' has a stage of 'a', but the field has 'u', 'v'; name the stages after the operators",
    ),
    (lambda: evaluate(LINEAR, IMAGES, LABELS), r"^protocol: got a tensor .* evaluate\(net, \(images, labels\)\)$"),
    (lambda: Layerwise("lie", 1.0)(LINEAR, IMAGES, LABELS), r"^net: got Linear, .*odeadv\.models\.from_module"),
    (lambda: train(LINEAR, (IMAGES, LABELS), TrainConfig()), r"^net: got Linear, .*odeadv\.models\.from_module"),
    (
        lambda: train(models.residual_mlp(1, 4, image_size=8), (IMAGES, LABELS), TrainConfig()),
        r"^data: got tuple, .*TensorDataset\(images, labels\)",
    ),
    (lambda: odeadv.solve(X0, decay, (0.0, 1.0), steps=1), "^field: got Tensor, .*the first argument"),
    (lambda: evaluate(LINEAR, (PICTURES, ONE_HOT)), r"^labels: got shape \(4, 2\), .*argmax\(1\).* one-hot rows$"),
    (lambda: evaluate(LINEAR, (PICTURES, ONE_HOT.float())), r"^labels: got dtype torch.float32, .*argmax\(1\)"),
    (lambda: evaluate(LINEAR, (PICTURES, LABELS.float())), r"^labels: .*\.long\(\); targets of a regression are not"),
    (
        lambda: attacks.pgd(LINEAR, IMAGES, torch.rand(4, 1), eps=0.1),
        r"^labels: .*targets of a regression are not supp",
    ),
    (
        lambda: attacks.pgd(LINEAR, IMAGES, torch.rand(4), eps=0.1),
        r"^labels: .*targets of a regression are not supported",
    ),
    (lambda: attacks.pgd(LINEAR, PIXELS, LABELS, eps=0.1), r"^images: got dtype torch.uint8, .*odeadv\.data\.to_float"),
    *(
        (
            lambda net=net: Layerwise("lie", 1.0)(net, PIXELS, LABELS),
            r"^images: got torch.uint8, .*odeadv\.data\.to_float",
        )
        for net in (models.residual_mlp(1, 4, image_size=8), models.preact_resnet(8, 4), WRAPPED)
    ),
    (lambda: Layerwise("lie", 1.0)(AVERAGED, IMAGES, LABELS), r"^net: got AveragedModel, .*inside of it, net\.module$"),
    (
        lambda: train(AVERAGED, (IMAGES, LABELS), TrainConfig()),
        r"^net: got AveragedModel, .*inside of it, net\.module$",
    ),
    (lambda: Penalty()(PARALLEL, IMAGES, LABELS), r"^net: got DataParallel, .*the network inside of it, net\.module$"),
    (
        lambda: Penalty()(nn.DataParallel(LINEAR), IMAGES, LABELS),
        r"^net: got DataParallel, .*odeadv\.models\.from_module",
    ),
    (
        lambda: models.from_blocks(nn.LSTM(2, 2), [LINEAR], LINEAR).field(IMAGES, LABELS),
        r"^stem: returned tuple, expected a tensor; pack .*docs/models\.md, 'What about a U-Net\?'",
    ),
    (
        lambda: models.from_blocks(LINEAR, [LINEAR], LINEAR, loss=SUM),
        "^loss: got MSELoss with reduction='sum', .*'mean'",
    ),
    (
        lambda: models.from_module(nn.Sequential(LINEAR), ["0"], loss=SUM),
        "^loss: got MSELoss with reduction='sum'",
    ),
    (lambda: Undefended()(WRAPPED, IMAGES, LABELS, loss=nn.CrossEntropyLoss(reduction="none")), "^loss: .*'none', exp"),
    (
        lambda: models.residual_mlp(1, 4, image_size=8).field(PICTURES, ONE_HOT, 1.0),
        r"^labels: got shape \(4, 2\), .*argmax\(1\).* one-hot rows$",
    ),
    (lambda: check_pixels("validation images", PICTURES), "^validation images: got dtype .*test_images of a data set$"),
    (lambda: TrainConfig(objective=Pgd), r"^objective: .*expected an instance of Objective, such as Pgd\(\)$"),
    (lambda: TrainConfig(optimizer="adam"), "^optimizer: got 'adam', .*such as {'name': 'adam'}$"),
]


@pytest.mark.parametrize(("mistake", "told"), MISTAKES, ids=[told[1:12] for _, told in MISTAKES])
def test_a_mistake_is_answered_with_what_to_write(mistake, told):
    with pytest.raises((TypeError, ValueError), match=told):
        mistake()


def steep(t, x):
    return -1e9 * x**3


DIFFUSION = odeadv.Operator.diagonal(torch.full((2,), -1e9), reversible=False)
KNOWN = odeadv.Operator(steep, flow=lambda t, dt, x: x / (1 + 2e9 * dt * x**2).sqrt())


@pytest.mark.parametrize(
    ("field", "arguments", "told"),
    [
        (odeadv.SplitField(a=DIFFUSION, b=KNOWN), {}, r"of operators 'a' and 'b': substep='exact'; take more steps; "),
        (odeadv.SplitField(a=DIFFUSION, b=decay), {}, r"of operator 'a': substep={'a': 'exact'}; take more steps; "),
        (
            odeadv.SplitField(a=odeadv.Operator.linear(-torch.eye(2)), b=KNOWN, c=decay),
            {"substep": {"a": "exact"}},
            r"of operator 'b': substep={'b': 'exact'}; take more steps; ",
        ),
        (KNOWN, {}, r"of operator 'f': substep='exact'; take more steps; "),
        (steep, {}, r"; take more steps; if the equation is stiff, use an implicit sub-step: substep='sdirk2'; throw="),
        (odeadv.AdversarialField(steep, torch.sum, 1.0), {}, r"; take more steps or a smaller eta; if the .*'sdirk2'"),
        (odeadv.AdversarialField(steep, torch.sum, 0.0), {}, r"; take more steps; if the equation is stiff, "),
    ],
)
def test_a_state_that_is_not_finite_is_answered_with_the_methods_that_fit(field, arguments, told):
    with pytest.raises(odeadv.SolveError, match=told) as raised:
        odeadv.solve(field, X0, (0.0, 1.0), steps=20, **arguments)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert ("eta" in str(raised.value)) == (getattr(field, "eta", 0.0) > 0)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_a_training_that_diverges_names_pixels_that_are_not_scaled(scale):
    data = torch.utils.data.TensorDataset(scale * torch.rand(16, 3, 8, 8), torch.arange(16) % 10)
    config = TrainConfig(epochs=4, batch_size=8, milestones=(), augment="none", lr=1e8)
    with pytest.raises(TrainingDiverged, match=r"lower lr \(1e\+08\)") as raised:
        train(models.residual_mlp(1, 4, image_size=8), data, config, progress=False)
    assert ("the inputs reach 25" in str(raised.value)) == (scale > 1)


def test_a_scheme_of_your_own_needs_no_source():
    assert str(odeadv.Scheme("mine", (STAGE("a", 1.0), STAGE("b", 1.0)), order=1)).startswith("mine: order 1\n")


def test_operators_and_results_say_what_they_are():
    assert repr(odeadv.Operator(decay, reversible=False)) == "Operator(decay, reversible=False)"
    assert repr(odeadv.Operator(flow=lambda t, dt, x: x)) == "Operator(flow=<lambda>)"
    result = TrainResult([EpochResult(1, 0.5, 0.9, 0.1, 3.0, validation={"clean": 0.875}, strength=0.05)], best_epoch=1)
    assert repr(result) == "TrainResult(1 epochs, loss 0.5, accuracy 90.0 %, clean 87.5 %, s 5 %, best epoch 1)"


def test_curves_of_several_trainings_are_in_one_picture():
    epoch = EpochResult(1, 0.5, 0.9, 0.1, 3.0, ratio=7.0, strength=0.05)
    natural = TrainResult([epoch, replace(epoch, epoch=2, loss=0.25)])
    robust = TrainResult([replace(epoch, validation={"clean": 0.8, "robust": 0.4})])
    loss, accuracy, *_ = plot_curves({"natural": natural, "PGD": robust}).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.5, 0.25], [0.5]]
    drawn = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert drawn == {"natural": [0.9, 0.9], "PGD": [0.8], "PGD, robust": [0.4]}
    with pytest.raises(TypeError, match=r"^results: got list, expected training results by name: {'LAD': result}"):
        plot_curves([natural])
    with pytest.raises(ValueError, match=r"^results: got no epochs for 'LAD', expected some to draw"):
        plot_curves({"LAD": TrainResult([])})


def test_the_picture_of_a_complex_state_says_that_it_is_the_real_part():
    sol = odeadv.solve(lambda t, x: 1j * x, torch.ones(32) + 0j, (0.0, 1.0), steps=2, save_at="steps")
    assert "Re x" in {axes.get_ylabel() for axes in sol.plot().axes}


def test_the_picture_of_a_field_is_a_profile_or_images():
    profile = odeadv.solve(decay, torch.rand(32), (0.0, 1.0), steps=4, save_at="steps")
    mesh = profile.plot().axes[0].collections[0]
    torch.testing.assert_close(torch.from_numpy(mesh.get_array().data).reshape(32, 5), profile.xs.T.double())
    plane = odeadv.solve(decay, torch.rand(2, 9, 8), (0.0, 1.0), steps=6, save_at="steps")
    pictures = [axes.images[0].get_array().data for axes in plane.plot().axes if axes.images]
    assert len(pictures) == 4
    torch.testing.assert_close(torch.from_numpy(pictures[-1]), plane.xs[-1, 0].double())
