"""How often the host waits for the GPU in a training step, of all recognisers' augmentations."""

import warnings
from unittest import mock

import pytest
import torch
from helpers import ROOT
from pretended_gpu import PretendedGPU

import compare_epoch_time
import sb_fast_sligru
from sb_fast_sligru.ops import _adadelta
from sligru_recipes.corpora import simulated as simulation
from sligru_recipes.epoch_time import comparison
from sligru_recipes.epoch_time import runs as epoch_runs
from sligru_recipes.epoch_time.recipe import load_recipe
from sligru_recipes.training.features import move_constants

STEPS = 3
MOST = 2  # waits


@pytest.fixture
def recipe(request, tmp_path, monkeypatch):
    """A recipe on 20 utterances of 1 to 3 s, with all augmentations."""
    name, *arguments = request.param
    monkeypatch.setitem(simulation.SPLITS, "dev-clean", (20, 1.0, *[2.0] * 13, 3.0))
    arguments = [
        str(ROOT / f"hparams/librispeech_{name}.yaml"),
        f"--overrides={ROOT / f'hparams/librispeech_{name}_mini.yaml'}",
        "--batches=2",
        "--simulate=dev-clean",
        "--no-io",
        "--max_batch_length=6",
        f"--output_folder={tmp_path}",
        "--rnn_neurons=8",
        "--dnn_neurons=8",
        *(f"--enable_{name}=True" for name in ("speed_perturb", "drop_freq", "drop_chunk")),
        *arguments,
    ]
    options, rest = compare_epoch_time.parse(arguments)
    with load_recipe(rest, options) as recipe:
        yield recipe


def start(recipe):
    """A Brain with all parts ours, and batches without an end."""
    names = comparison.make_variants(recipe, compare_epoch_time.Options(), "SLi-GRU", "fp32")
    variant = [v for v in names if comparison.is_ours(v.implementation)][-1]
    run = epoch_runs.start_run(recipe, variant, recipe.plan * 10)
    run.brain.step = 1
    return run


@pytest.mark.parametrize(
    "recipe", [("ctc", "--device=cpu"), ("seq2seq", "--device=cpu")], indirect=True, ids=str
)
def test_one_wait_a_step_on_a_gpu_that_is_not_there(recipe, monkeypatch):
    run = start(recipe)
    brain, hparams = run.brain, run.brain.hparams
    brain.fit_batch(next(run.loader))  # on the CPU: the first has no statistics yet
    gpu = PretendedGPU()
    gpu.move(brain.modules, *hparams.speed_perturb.resamplers)
    with gpu:
        move_constants(hparams.compute_features, "cuda")
    brain.device = hparams.speed_perturb.device = "cuda"
    brain.init_optimizers()

    def backward(loss):
        for parameter in brain.modules.parameters():
            parameter.grad = torch.empty_like(parameter)

    assert hparams.ctc_cost is sb_fast_sligru.ctc_loss
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for _ in range(STEPS):
        batch = next(run.loader)
        gpu.waits.clear()
        with gpu, sb_fast_sligru.backend("reference"):
            loss = brain.fit_batch(batch)
        assert gpu.waits == ["aten._to_copy.default to the host"]
        assert loss.is_cpu


def test_the_pretended_gpu_tells_waits():
    gpu = PretendedGPU()
    with gpu:
        x = torch.zeros(3, device="cuda")
        (x + 1).cpu()
        torch.ones(3).to("cuda")
        x[torch.tensor([1])]
        assert torch.ones(3).sum() == 3  # the host's own
        with pytest.raises(RuntimeError, match="two different devices"):
            x + torch.ones(3)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(x.isfinite().all())
        assert [wait.rpartition(" the ")[0].split()[-1] for wait in gpu.waits] == [
            "to",
            "from",
            "of",
        ]


def waits_of(function):
    """How often PyTorch says that a call made the host wait."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [w for w in told if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe",
    [
        (name, "--device=cuda:0", "--num_workers=1", f"--precision={precision}")
        for name in ("ctc", "seq2seq")
        for precision in ("fp32", "bf16", "fp16")
    ],
    indirect=True,
    ids=str,
)
def test_waits_of_a_step_on_a_gpu(recipe):
    run = start(recipe)
    for _ in range(4):
        run.brain.fit_batch(next(run.loader))
    for resampler in run.brain.hparams.speed_perturb.resamplers:  # each is moved when it is drawn
        resampler.to("cuda")
    for _ in range(STEPS):
        batch = next(run.loader)
        assert batch.sig.data.is_pinned()
        told = waits_of(lambda batch=batch: run.brain.fit_batch(batch))
        where = [f"{w.filename}:{w.lineno}" for w in told]
        assert len(told) <= MOST, where


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe",
    [("ctc", "--device=cuda:0", "--opt_class=!name:sb_fast_sligru.Adadelta", "--lr=1.0")],
    indirect=True,
    ids=str,
)
def test_adadelta_updates_all_weights_at_once(recipe):
    """On a GPU our operator has all weights of the default YAMLs in one call."""
    run = start(recipe)
    with mock.patch.object(_adadelta, "update", side_effect=_adadelta.update) as update:
        run.brain.fit_batch(next(run.loader))
    update.assert_called_once()
    assert len(update.call_args.args[0]) == len(list(run.brain.modules.parameters()))
