"""Running into an output folder that has a run: what goes on, what is refused, what is kept."""

import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import socket

import numpy as np
import pytest
import ruamel.yaml
import sentencepiece
import torch
from helpers import ROOT
from recorded_run import then
from speechbrain.utils.checkpoints import Checkpointer
from tiny_corpora import SPLITS, make_noise
from tiny_runs import TINY, complaint, held_by_another

import sb_fast_sligru
import train_ctc
from sligru_recipes.corpora.librispeech import prepare_librispeech
from sligru_recipes.lock import lock_folder
from sligru_recipes.training.brain import RecipeBrain
from sligru_recipes.training.experiment import load_hparams
from sligru_recipes.training.resume import with_overrides

pytestmark = pytest.mark.usefixtures("environment_described_once", "one_thread")


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Twelve train utterances of as many lengths."""
    return make_noise(tmp_path_factory.mktemp("noise"), np.linspace(0.6, 2.0, 12).tolist())


def arguments(noise, folder, *more):
    """Of a run of two epochs; `more` takes the place of what it has already."""
    given = {argument.split("=")[0] for argument in more}
    common = [*TINY, f"--data_folder={noise}", "--number_of_epochs=2", "--max_batch_length=4"]
    common += ["--num_buckets=3", "--ckpt_interval_minutes=0"]
    own = [str(a) for a in common if str(a).split("=")[0] not in given]
    return [*own, f"--output_folder={folder}", *more]


@pytest.fixture(scope="module")
def finished_run(noise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_ctc.main(arguments(noise, folder))
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy that a test may go on with."""
    return shutil.copytree(finished_run, tmp_path / "run")


def keys_of(folder):
    return ruamel.yaml.YAML().load((folder / "hyperparams.yaml").read_text())


def contents(folder):
    """File -> bytes, of all but the log and the lock."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", ".lock")
    }


def said(folder):
    """What the log of the last run in a folder has."""
    return (folder / "log.txt").read_text().rpartition("Beginning experiment!")[2]


def train(argv, stop_in=None):
    """Train, up to the end of the batch `stop_in`, (epoch, number); returns epoch -> utterances."""
    seen = {}

    def note(self, batch, outputs, loss, should_step):
        seen.setdefault(self.epoch, []).append(batch.id)

    def stop(self, last_ckpt_time, steps_since_ckpt):
        if (self.epoch, self.step) == stop_in:
            raise KeyboardInterrupt

    with (
        then(RecipeBrain, "on_fit_batch_end", note),
        then(RecipeBrain, "_should_save_intra_epoch_ckpt", stop),
    ):
        if stop_in is None:
            train_ctc.main(argv)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_ctc.main(argv)
    return seen


# What changes the batches


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ([], ["--max_batch_length=8"], "max_batch_length"),
        ([], ["--seed=7"], "seed"),
        (
            ["--dynamic_batching=False", "--batch_size=2", "--sorting=random"],
            ["--batch_size=3"],
            "batch_size",
        ),
    ],
)
def test_other_batches_start_the_epoch_anew(noise, tmp_path, before, after, key):
    """Stopped after four batches of the first epoch, three of them in the checkpoint."""
    before = [*before, "--ckpt_interval_steps=3"]
    kept = [argument for argument in before if not argument.startswith(f"--{key}=")]
    train(arguments(noise, tmp_path, *before), stop_in=(1, 4))
    seen = train(arguments(noise, tmp_path, *kept, *after))
    for epoch in (1, 2):
        utterances = [name for batch in seen[epoch] for name in batch]
        assert len(utterances) == len(set(utterances)) == 12, epoch
    pattern = r"epoch 1 starts anew: its first 3 batches.*changed: (.*)\)"
    assert key in re.search(pattern, said(tmp_path))[1].split(", ")


def test_other_utterances_start_the_epoch_anew(noise, tmp_path):
    """The keys are the same, the manifest has another file."""
    more = ("--ckpt_interval_steps=3", "--skip_prep=True", "--number_of_epochs=1")
    argv = arguments(noise, tmp_path / "run", *more)
    prepare_librispeech(noise, tmp_path / "run/save", *([split] for split in SPLITS), num_workers=0)
    seen = train(argv, stop_in=(1, 4))
    manifest = tmp_path / "run/save/train.csv"
    name = seen[1][0][0]
    manifest.write_text(manifest.read_text().replace(f"{name},", "1-10-9999,", 1))
    seen = train(argv)
    assert sum(map(len, seen[1])) == 12
    assert "changed: no key, but the data or the number of processes" in said(tmp_path / "run")


def test_another_number_of_processes_starts_the_epoch_anew(noise, tmp_path, monkeypatch):
    """torchrun tells it by a variable."""
    argv = arguments(noise, tmp_path, "--ckpt_interval_steps=3", "--number_of_epochs=1")
    train(argv, stop_in=(1, 4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sum(map(len, train(argv)[1])) == 12
    assert "changed: no key, but the data or the number of processes" in said(tmp_path)


def test_same_batches_go_on(noise, tmp_path):
    """Also where keys changed that have no part in them."""
    first = train(arguments(noise, tmp_path, "--ckpt_interval_steps=3"), stop_in=(1, 4))
    more = ("--ckpt_interval_steps=2", "--dropout=0.1", "--number_of_epochs=1")
    rest = train(arguments(noise, tmp_path, *more))
    utterances = [name for batch in first[1][:3] + rest[1] for name in batch]
    assert len(utterances) == len(set(utterances)) == 12
    assert "starts anew" not in said(tmp_path)


# What is honoured


def learning_rates(folder):
    log = (folder / "train_log.txt").read_text()
    return [float(rate) for rate in re.findall(r"^epoch: .*lr: ([\d.e+-]+)", log, re.M)]


def test_learning_rate_is_that_of_the_command_if_it_changed(noise, tmp_path):
    annealed = "--improvement_threshold=100"  # after each epoch but the first
    train(arguments(noise, tmp_path, annealed, "--number_of_epochs=3"))
    train(arguments(noise, tmp_path, annealed, "--number_of_epochs=4"))
    expected = [3e-3, 3e-3, 3e-3 * 0.8, 3e-3 * 0.8**2]
    assert learning_rates(tmp_path) == pytest.approx(expected, rel=0.01)
    assert "from here on" not in said(tmp_path)
    changed = arguments(noise, tmp_path, annealed, "--number_of_epochs=6", "--lr=0.01")
    # Stopped before there is a checkpoint that knows of it; then twice the same command.
    train(changed, stop_in=(5, 1))
    assert "lr is 0.01 from here on" in said(tmp_path)
    train(changed, stop_in=(6, 1))
    assert keys_of(tmp_path)["lr"] == 0.01
    train(changed)
    assert "from here on" not in said(tmp_path)
    assert learning_rates(tmp_path)[4:] == pytest.approx([0.01, 0.008], rel=0.01)


def test_options_of_the_optimiser_are_those_of_the_command(noise, tmp_path):
    kept = "--improvement_threshold=-100"  # lr is not annealed
    train(arguments(noise, tmp_path, "--opt_class={rho: 0.9}", "--number_of_epochs=1", kept))
    groups = []

    def note(self, *args):
        groups.append(self.optimizer.param_groups[0])

    with then(RecipeBrain, "on_fit_batch_end", note):
        train_ctc.main(arguments(noise, tmp_path, "--opt_class={rho: 0.5}", kept))
    assert groups[0]["rho"] == keys_of(tmp_path)["opt_class"]["rho"] == 0.5
    assert groups[0]["lr"] == 3e-3


@pytest.mark.parametrize(
    "classes",
    [
        (sb_fast_sligru.Adadelta, torch.optim.Adadelta),
        (torch.optim.Adadelta, sb_fast_sligru.Adadelta),
    ],
    ids=["from ours", "to ours"],
)
def test_pytorchs_adadelta_and_ours_go_on_with_each_other(noise, tmp_path, classes):
    """With the averages that the other has left."""
    seen = []

    def note(self, *args):
        state = self.optimizer.state_dict()["state"]
        seen.append((type(self.optimizer), state[0]["step"].item()))

    folders = {torch.optim.Adadelta: "torch.optim", sb_fast_sligru.Adadelta: "sb_fast_sligru"}
    with then(RecipeBrain, "on_fit_batch_end", note):
        for epoch, optimizer_class in enumerate(classes, 1):
            chosen = f"--opt_class=!name:{folders[optimizer_class]}.Adadelta"
            train(arguments(noise, tmp_path, chosen, f"--number_of_epochs={epoch}"))
    batches = len(seen) // 2
    assert batches > 1
    assert seen == [(classes[i // batches], i + 1) for i in range(2 * batches)]


def test_run_options_are_recorded(noise, tmp_path):
    train(arguments(noise, tmp_path, "--precision=bf16", "--number_of_epochs=1"))
    assert keys_of(tmp_path)["precision"] == "bf16"


def test_finished_run_says_so(noise, run_folder):
    log = (run_folder / "train_log.txt").read_text()
    assert train(arguments(noise, run_folder)) == {}
    assert "all 2 epochs are done, nothing is left to train" in said(run_folder)
    assert (run_folder / "train_log.txt").read_text().startswith(log)


# What is refused


@pytest.mark.parametrize(
    "change",
    [
        "rnn_neurons=9",
        "rnn_class=!name:sb_fast_sligru.LiGRU",
        "cnn_channels=[3]",
        "n_mels=20",
        "opt_class=!name:torch.optim.SGD",
        "token_type=bpe",
        "vocab_size=7",
        "character_coverage=0.9",
    ],
)
def test_refused_resume_leaves_the_run_alone(noise, run_folder, change):
    before = contents(run_folder)
    message = complaint(arguments(noise, run_folder, f"--{change}"))
    key, _, value = change.partition("=")
    assert re.search(
        rf"output_folder {run_folder} .*\b{key} was .*, now {re.escape(value)}", message
    )
    assert contents(run_folder) == before


def test_other_tokenizer_is_refused(noise, run_folder, tmp_path):
    (tmp_path / "text.txt").write_text("ONE TWO THREE\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "other"),
        model_type="char",
        vocab_size=6,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    before = contents(run_folder)
    message = complaint(arguments(noise, run_folder, f"--tokenizer_file={tmp_path}/other.model"))
    assert f"tokenizer_file {tmp_path}/other.model is not the tokenizer" in message
    assert contents(run_folder) == before
    (own,) = (run_folder / "save").glob("*.model")
    shutil.copy(own, tmp_path / "same.model")
    assert train(arguments(noise, run_folder, f"--tokenizer_file={tmp_path}/same.model")) == {}


def test_what_fits_the_checkpoint_is_not_refused(noise, run_folder):
    """SpeechBrain's class has the same weights."""
    more = ("--rnn_class=!name:speechbrain.nnet.RNN.SLiGRU", "--dropout=0.1")
    train(arguments(noise, run_folder, *more, "--number_of_epochs=3"))
    assert len(learning_rates(run_folder)) == 3
    assert keys_of(run_folder)["dropout"] == 0.1
    told = re.search("goes on with other settings: (.*)", said(run_folder))[1]
    ours, stock = "!name:sb_fast_sligru.SLiGRU", "!name:speechbrain.nnet.RNN.SLiGRU"
    assert "dropout was 0.0, now 0.1, number_of_epochs was 2, now 3" in told
    assert f"rnn_class was {ours}, now {stock}" in told
    assert "model" not in told  # it only refers to what is other


def test_vocabulary_that_was_sized_down_goes_on(noise, tmp_path):
    """By the same command, by the saved YAML; a model of another size is refused all the same."""
    argv = arguments(noise, tmp_path, "--vocab_size=500", "--token_type=unigram")
    train(argv)
    assert keys_of(tmp_path)["vocab_size"] < 500
    assert train(argv) == {}
    assert "rnn_neurons was 8, now 9" in complaint(
        [argument for argument in argv if "rnn_neurons" not in argument] + ["--rnn_neurons=9"]
    )
    train_ctc.main([str(tmp_path / "hyperparams.yaml"), "--device=cpu"])
    assert "all 2 epochs are done" in said(tmp_path)


def test_saved_yaml_goes_on_with_the_run(noise, tmp_path):
    """With overrides that have their effect, though other keys refer to theirs."""
    train(arguments(noise, tmp_path, "--number_of_epochs=1"))
    saved = [str(tmp_path / "hyperparams.yaml"), "--device=cpu", "--noprogressbar"]
    assert train(saved) == {}
    assert list(train([*saved, "--number_of_epochs=2", "--dropout=0.1"])) == [2]
    keys = keys_of(tmp_path)
    assert (keys["number_of_epochs"], keys["dropout"], keys["rnn_neurons"]) == (2, 0.1, 8)
    assert "dropout was 0.0, now 0.1, number_of_epochs was 1, now 2" in said(tmp_path)
    assert train(saved) == {}


CLASSES = {
    "rnn_class": ("speechbrain.nnet.RNN", "SLiGRU"),
    "decoder_class": ("speechbrain.nnet.RNN", "AttentionalRNNDecoder"),
    "valid_search_class": ("speechbrain.decoders", "S2SRNNGreedySearcher"),
    "test_search_class": ("speechbrain.decoders", "S2SRNNBeamSearcher"),
    "ctc_scorer_class": ("speechbrain.decoders.scorer", "CTCScorer"),
}


@pytest.mark.parametrize("key", CLASSES)
def test_saved_yaml_has_the_classes_of_the_command_line(tmp_path, key):
    """And takes others."""
    stock_package, name = CLASSES[key]
    ours, stock = (
        ruamel.yaml.YAML().load(f"!name:{package}.{name}")
        for package in ("sb_fast_sligru", stock_package)
    )
    sizes = dict.fromkeys(("rnn_neurons", "dnn_neurons", "dec_neurons", "attn_dim"), 4)
    overrides = sizes | {"data_folder": "x", "output_folder": str(tmp_path), key: stock}
    yaml = ROOT / "hparams/librispeech_seq2seq.yaml"
    saved = tmp_path / "hyperparams.yaml"
    saved.write_text(with_overrides(yaml, overrides))
    for given, package in (({}, stock_package), ({key: ours}, "sb_fast_sligru")):
        hparams = load_hparams(saved, given)
        module = {
            "rnn_class": hparams["enc"].RNN,
            "decoder_class": hparams["dec"],
            "valid_search_class": hparams["valid_search"],
            "test_search_class": hparams["test_search"](),
            "ctc_scorer_class": hparams["ctc_scorer"],
        }[key]
        assert type(module).__module__.startswith(package)
        assert type(module).__name__ == name


@pytest.mark.parametrize("key", [key for key in CLASSES if key != "rnn_class"])
def test_what_is_no_class_is_named_before_any_work(tmp_path, key):
    overrides = dict.fromkeys(("rnn_neurons", "dnn_neurons", "dec_neurons", "attn_dim"), 4)
    overrides |= {"data_folder": "x", "output_folder": str(tmp_path / "output")}
    for value in (3, ruamel.yaml.YAML().load("!name:torch.zeros")):
        with pytest.raises(ValueError, match="_class must be a class") as raised:
            load_hparams(ROOT / "hparams/librispeech_seq2seq.yaml", overrides | {key: value})
        # The greedy search is built with the YAML, whose argument is meant.
        assert key.removeprefix("valid_") in str(raised.value)


def test_debugging_leaves_a_run_alone(noise, run_folder):
    before = contents(run_folder)
    message = complaint(arguments(noise, run_folder, "--debug"))
    assert f"--debug: output_folder {run_folder} has a run" in message
    assert contents(run_folder) == before


def test_failing_preparation_leaves_the_settings(noise, run_folder, tmp_path):
    before = contents(run_folder)
    nowhere = ("--dropout=0.3", f"--data_folder={tmp_path}/nowhere")
    assert "nowhere" in complaint(arguments(noise, run_folder, *nowhere))
    assert contents(run_folder) == before


@pytest.mark.parametrize("name", ["model", "optimizer", "brain", "scheduler"])
@pytest.mark.parametrize("damage", [b"", b"nothing"])
def test_damaged_checkpoint_is_named(noise, run_folder, name, damage):
    for checkpoint in Checkpointer(run_folder / "save").list_checkpoints():
        checkpoint.paramfiles[name].write_bytes(damage)
    before = contents(run_folder)
    message = complaint(arguments(noise, run_folder, "--number_of_epochs=3", "--dropout=0.3"))
    assert re.search(rf"/CKPT\+[^/]*/{name}.ckpt is damaged.*: \S", message)
    assert (run_folder / "hyperparams.yaml").read_bytes() == next(
        content for path, content in before.items() if path.name == "hyperparams.yaml"
    )


@pytest.mark.parametrize("damage", ["", "[]", "a: b: c"])
def test_damaged_metadata_is_named(noise, run_folder, damage):
    for checkpoint in Checkpointer(run_folder / "save").list_checkpoints():
        (checkpoint.path / "CKPT.yaml").write_text(damage)
    message = complaint(arguments(noise, run_folder))
    assert re.search(r"/CKPT\+[^/]*/CKPT.yaml is damaged: \S", message)


@pytest.mark.parametrize("option", ["--test_only", "--number_of_epochs=0"])
def test_nothing_to_test_is_told(noise, tmp_path, option):
    message = complaint(arguments(noise, tmp_path, option))
    assert f"{tmp_path}/save has no checkpoint" in message


# Two runs at once


def test_folder_in_use_is_refused_until_the_other_ends(noise, run_folder):
    before = contents(run_folder)
    with held_by_another(run_folder) as other:
        message = complaint(arguments(noise, run_folder))
        name = f"host {socket.gethostname()}, process {other.pid}"
        assert f"output_folder {run_folder} is in use by another run ({name})" in message
        assert contents(run_folder) == before
    assert train(arguments(noise, run_folder)) == {}  # it was killed, its file is in nobody's way


def test_workers_do_not_hold_the_folder(tmp_path):
    """A forked process of the run's loaders may live some seconds longer than the run."""
    with lock_folder(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=signal.pause)
        worker.start()
    with held_by_another(tmp_path):
        assert worker.is_alive()
    worker.kill()
    worker.join()


def test_folder_on_a_system_without_locks_is_taken_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock_folder(tmp_path / "new"):
        assert f"output_folder {tmp_path}/new cannot be locked" in caplog.text


# Initial weights, averages


def test_weights_of_another_run_start_a_run(noise, tmp_path):
    argv = arguments(noise, tmp_path / "one", "--export_inference=True")
    train(argv)
    first = {}

    def note(self):
        first.update({k: v.clone() for k, v in self.hparams.model.state_dict().items()})

    folder = tmp_path / "one/inference"
    given = (f"--pretrained_folder={folder}", f"--tokenizer_file={folder}/tokenizer.ckpt")
    with then(RecipeBrain, "_ready", note):
        train(arguments(noise, tmp_path / "two", *given, "--number_of_epochs=1"))
    expected = torch.load(tmp_path / "one/inference/model.ckpt")
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    # Gone on with, it has weights of its own.
    with then(RecipeBrain, "_ready", note):
        train(arguments(noise, tmp_path / "two", *given, "--number_of_epochs=1"))
    assert any(not torch.equal(first[name], expected[name]) for name in expected)
    assert "pretrained_folder was" in complaint(arguments(noise, tmp_path / "two", given[1]))
    other = arguments(noise, tmp_path / "three", given[0], "--rnn_neurons=9", given[1])
    assert f"pretrained_folder {tmp_path}/one/inference is of another model" in complaint(other)
    argv = arguments(noise, tmp_path / "four", given[0])  # would train a tokenizer of its own
    assert f"tokenizer: set tokenizer_file to {folder}/tokenizer.ckpt" in complaint(argv)
    (folder / "normalizer.ckpt").unlink()
    argv = arguments(noise, tmp_path / "four", *given)
    assert f"pretrained_folder {folder} has no normalizer.ckpt" in complaint(argv)
    assert not (tmp_path / "four").exists()


def test_mean_of_the_last_checkpoints_is_tested_and_exported(noise, tmp_path):
    tested = []

    def note(self, *args, **kwargs):
        tested.append({k: v.clone() for k, v in self.hparams.model.state_dict().items()})

    more = ("--avg_checkpoints=2", "--number_of_epochs=4", "--export_inference=True")
    with then(RecipeBrain, "on_evaluate_start", note):
        train(arguments(noise, tmp_path, *more))
    saved = [c for c in Checkpointer(tmp_path / "save").list_checkpoints() if c.meta["epoch"] > 2]
    assert sorted(c.meta["epoch"] for c in saved) == [3, 4]
    one, two = (torch.load(c.paramfiles["model"]) for c in saved)
    exported = torch.load(tmp_path / "inference/model.ckpt")
    for name, weight in tested[0].items():
        if weight.is_floating_point():
            torch.testing.assert_close(weight, (one[name] + two[name]) / 2)
            assert torch.equal(exported[name], weight), name
    assert "epochs averaged: 3 4" in (tmp_path / "train_log.txt").read_text()


def test_fewer_checkpoints_than_asked_for_are_told(noise, run_folder):
    train(arguments(noise, run_folder, "--avg_checkpoints=5", "--test_only"))
    assert "avg_checkpoints is 5, but" in said(run_folder)
